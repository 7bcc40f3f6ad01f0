"""The metrics of a run, in ``metrics.jsonl``, on the console and in trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import isfinite, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlx_gpt.errors import MLXGPTError
from mlx_gpt.files import atomic_write, open_file, parse_json
from mlx_gpt.train.report.trackers import Tracker
from mlx_gpt.train.units import format_time

if TYPE_CHECKING:
    from rich.console import Console

METRICS = "metrics.jsonl"
FORMATS = {
    "loss": "loss {:.3f}",
    "val_loss": "validation {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "tokens_per_second": "{:,.0f} tokens/s",
}
MAX_LINE = 1 << 16  # bytes of a row
LINE_INTERVAL = 30.0  # seconds between lines, at most, without a panel


@dataclass
class Report:
    """Record the metrics of a run in memory, in ``folder/metrics.jsonl``, on the console and in ``trackers``.

    Rows have ``step``, ``tokens`` and, where measured, ``loss`` and ``val_loss`` (nats per token), ``bits_per_byte``,
    ``learning_rate``, ``grad_norm``, ``tokens_per_second``, ``peak_memory_bytes``. The first row creates the folder, so
    that a run that fails before it leaves nothing behind. Without a folder nothing is written.

    On a terminal ``LivePanel`` shows the newest values, drawn by a separate thread, so that no step waits for it.
    Otherwise a line is printed at each evaluation and after ``LINE_INTERVAL``.

    ``rows`` are the rows of an earlier part of the run that are in the file already (``truncate_metrics``).
    ``tokens_per_byte`` of the validation text adds ``bits_per_byte`` to each row with a ``val_loss``.
    ``matrix_tokens_per_second``, which training would reach with matrix products alone, is for the panel.
    """

    folder: Path | None
    console: Console
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_byte: float | None = None
    matrix_tokens_per_second: float | None = None
    trackers: Sequence[Tracker] = ()

    def __post_init__(self) -> None:
        from mlx_gpt.train.report.panel import LivePanel

        self._file: TextIO | None = None
        self._last_line = time.monotonic()
        self._panel = LivePanel(self.matrix_tokens_per_second)
        self._is_live = self.console.is_terminal and not self.console.quiet
        if self._is_live:
            self._panel.start(self.console)
        for row in self.rows:
            self._panel.update(row)

    def row(self, **values: Any) -> None:
        """Record one row of metrics and write it to disk at once; nan and inf become null."""
        row = {name: _json_value(value) for name, value in values.items()}
        if self.tokens_per_byte and row.get("val_loss") is not None:
            row["bits_per_byte"] = bits_per_byte(row["val_loss"], self.tokens_per_byte)
        self._write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        self._panel.update(row)
        for tracker in self.trackers:
            tracker.row(row)

    def progress(self, done: float, seconds_left: float) -> None:
        """Show the share of the run that is done (0 to 1) with the newest values."""
        self._panel.done, self._panel.seconds_left = done, seconds_left
        if not self._is_live and time.monotonic() - self._last_line > LINE_INTERVAL:
            self._print_line(done, seconds_left, "loss", "tokens_per_second")

    def evaluated(self, done: float, seconds_left: float) -> None:
        """Print a line that stays, on a terminal or not."""
        speed = [] if self._is_live else ["tokens_per_second"]
        self._print_line(done, seconds_left, "loss", "val_loss", "bits_per_byte", *speed)

    def close(self) -> None:
        """Close the panel, the file and the trackers."""
        self._panel.stop()
        if self._file:
            self._file.close()
        for tracker in self.trackers:
            tracker.close()

    def _write(self, line: str) -> None:
        if self.folder is None:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / METRICS).open("a" if self.rows else "w", encoding="utf-8")
        self._file.write(line)
        self._file.flush()

    def _print_line(self, done: float, seconds_left: float, *names: str) -> None:
        self._last_line, latest = time.monotonic(), self._panel.latest
        parts = [f"{done:4.0%}", f"step {latest.get('step', 0):,}"]
        parts += [FORMATS[name].format(latest[name]) for name in names if latest.get(name) is not None]
        parts += [] if self._is_live else [f"{format_time(seconds_left)} left"]
        self.console.print(" · ".join(parts), highlight=False, soft_wrap=True)


def bits_per_byte(val_loss: float, tokens_per_byte: float) -> float:
    """Convert nats per token to bits per byte of UTF-8 text, which do not depend on the tokenizer."""
    return val_loss * tokens_per_byte / log(2)


def truncate_metrics(folder: Path, n: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Truncate ``folder/metrics.jsonl`` to its first ``n`` rows, atomically, and return them.

    Rows that a run wrote after its last checkpoint are written again when it is resumed. A file that ends early is
    reported. Raises ``MLXGPTError`` if it holds anything but rows of metrics.
    """
    file = folder / METRICS
    try:
        lines = _read_lines(file, n)
    except OSError as error:
        raise MLXGPTError(
            f"{file}: expected the metrics of the run, but it cannot be read ({error.strerror})"
        ) from error
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            rows.append(_parse_row(line, rows[-1] if rows else None))
        except ValueError as error:
            raise MLXGPTError(
                f"{file}: line {len(rows) + 1}: expected a row of metrics, found something else ({error}); restore the "
                f"file, or remove it to resume without the earlier rows"
            ) from error
    if len(rows) < n:
        report(f"{file}: expected {n} rows, found {len(rows)}: those of earlier steps are lost")
    atomic_write(file, b"".join(lines))
    return rows


def _read_lines(file: Path, n: int) -> list[bytes]:
    """Return the first ``n`` lines, or fewer if the file is missing or ends early, perhaps in the middle of a line."""
    if not os.path.lexists(file):
        return []
    with open_file(file) as stream:
        lines = list(takewhile(bool, (stream.readline(MAX_LINE) for _ in range(n))))
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < MAX_LINE else lines


def _parse_row(line: bytes, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the row of a line. Raises ``ValueError`` unless it is one that can follow the ``previous`` one."""
    row = parse_json(line)
    if not isinstance(row, dict) or not all(value is None or _is_number(value) for value in row.values()):
        raise ValueError("not an object of numbers")
    if not all(isinstance(row.get(name), int) and row[name] >= 0 for name in ("step", "tokens")):
        raise ValueError("without step and tokens")
    if previous and (row["step"] < previous["step"] or ("loss" in row and row["step"] == previous["step"])):
        raise ValueError(f"step {row['step']} after step {previous['step']}")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _json_value(value: Any) -> Any:
    """Convert numbers of NumPy and MLX to Python's, and nan and infinities to None."""
    if not isinstance(value, (bool, int, float, str, type(None))):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value
