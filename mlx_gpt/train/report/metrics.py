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
from mlx_gpt.store.checkpoint import RunProgress
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
START = {"step": 0, "tokens": 0}
LINE_INTERVAL = 30.0  # seconds between lines, at most, without a panel


@dataclass
class RunReport:
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


def truncate_metrics(folder: Path, progress: RunProgress, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Truncate ``folder/metrics.jsonl`` to the rows of a checkpoint, atomically, and return them.

    Rows that a run wrote after its last checkpoint are written again when it is resumed. A file that ends early is
    reported, and gets a row of the checkpoint's ``step`` and ``tokens`` alone, which marks the gap. So is anything
    but rows after those of the checkpoint. Raises ``MLXGPTError`` if it is among them.
    """
    file, n = folder / METRICS, progress.rows
    try:
        lines, rest = _read_lines(file, n)
    except OSError as error:
        raise MLXGPTError(
            f"{file}: expected the metrics of the run, but it cannot be read ({error.strerror})"
        ) from error
    rows: list[dict[str, Any]] = []
    try:
        for line in lines:
            rows.append(_parse_row(line, rows[-1] if rows else START))
        if len(rows) == n > 0 and rows[-1]["step"] != progress.step:
            raise ValueError(f"step {rows.pop()['step']} where the checkpoint is of step {progress.step}")
    except ValueError as error:
        raise MLXGPTError(
            f"{file}: line {len(rows) + 1}: expected a row of metrics, found something else ({error}); restore the "
            f"file, or remove it to resume without the earlier rows"
        ) from error
    if (found := len(rows)) < n:
        report(f"{file}: expected {n} rows, found {found}: those of earlier steps are lost")
        rows.append({"step": progress.step, "tokens": progress.tokens})
        lines.append(json.dumps(rows[-1]).encode() + b"\n")
    if rest:
        report(f"{file}: line {n + rest}: expected a row of metrics, found something else; it is removed")
    atomic_write(file, b"".join(lines))
    return rows


def _read_lines(file: Path, n: int) -> tuple[list[bytes], int]:
    """Return the first ``n`` lines, or fewer, and the number after these of the first line that is no row, or 0.

    The file may be missing or end early, perhaps in the middle of a line.
    """
    if not os.path.lexists(file):
        return [], 0
    with open_file(file) as stream:
        lines = list(takewhile(bool, (stream.readline(MAX_LINE) for _ in range(n))))
        following = takewhile(bool, iter(lambda: stream.readline(MAX_LINE), None))
        rest = next((i for i, line in enumerate(following, 1) if not (_is_cut(line) or _is_row(line))), 0)
    return lines[:-1] if lines and _is_cut(lines[-1]) else lines, rest


def _is_cut(line: bytes) -> bool:
    """Return True if a line is the beginning of a row, as a killed process leaves it."""
    return not line.endswith(b"\n") and len(line) < MAX_LINE and line.startswith(b"{")


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _parse_row(line: bytes, previous: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a line. Raises ``ValueError`` unless it is one that can follow the ``previous`` one.

    Each step has a row with its loss. After it may come one with a validation loss, and one that marks a gap.
    """
    row = parse_json(line)
    if not isinstance(row, dict) or not all(value is None or _is_number(value) for value in row.values()):
        raise ValueError("not an object of numbers")
    if not all(isinstance(row.get(name), int) and row[name] >= 0 for name in ("step", "tokens")):
        raise ValueError("without step and tokens")
    step, before = row["step"], previous["step"]
    follows = step == before + 1 if "loss" in row else step == before if "val_loss" in row else step >= before
    if not follows:
        raise ValueError(f"step {step} after step {before}")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _json_value(value: Any) -> Any:
    """Convert numbers of NumPy and MLX to Python's, and nan and infinities to None."""
    if not isinstance(value, (bool, int, float, str, type(None))):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value
