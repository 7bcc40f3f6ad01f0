"""The server's log on stderr: one line a message, and for each kind of message at most one line a minute.

A client that can provoke a message can provoke millions of them.
"""

from __future__ import annotations

import asyncio
import logging
import time

LOG = logging.getLogger("mlx_gpt.serve")
PERIOD = 60.0  # seconds

EXPECTED = (OSError, asyncio.CancelledError)  # caused from outside: no traceback


class OncePerPeriod(logging.Filter):
    """Passes one message of each kind, its text before formatting, a period; the next states how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}
        self._dropped: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.msg).partition("\n")[0]
        now = time.monotonic()
        if now - self._last.get(kind, -PERIOD) < PERIOD:
            self._dropped[kind] = self._dropped.get(kind, 0) + 1
            return False
        self._last[kind] = now
        n = self._dropped.pop(kind, 0)
        record.more = f" ({n} more since the last)" if n else ""
        return True


class OneLine(logging.Formatter):
    """A message on one line, and a traceback only for a mistake of the program."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"mlx-gpt: {record.getMessage().strip().partition(chr(10))[0]}{getattr(record, 'more', '')}"
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, EXPECTED):
            return f"{line}: {error or type(error).__name__}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info and error else line


def log_to_stderr() -> None:
    """Write the messages of the server, uvicorn and asyncio to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    handler.addFilter(OncePerPeriod())
    for name in (LOG.name, "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
