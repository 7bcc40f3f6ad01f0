"""What a run says while it trains: a live panel or plain lines, ``metrics.jsonl``, and whatever else keeps metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlx_gpt.files import atomic_write
from mlx_gpt.train.report.panel import LivePanel, clock
from mlx_gpt.train.report.trackers import Tracker

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

METRICS = "metrics.jsonl"
REFRESHES = 3  # of the live panel, a second
SAID = {
    "loss": "loss {:.3f}",
    "val_loss": "validation {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "tokens_per_second": "{:,.0f} tokens/s",
}
SILENCE = 30.0  # seconds: where there is no panel, a line is due after so long without one


@dataclass
class Report:
    """Collects a run's metrics: in memory, in ``folder/metrics.jsonl``, on the console and in ``trackers``.

    Rows have ``step``, ``tokens`` and, where measured, ``loss`` and ``val_loss`` (nats per token), ``bits_per_byte``,
    ``learning_rate``, ``grad_norm``, ``tokens_per_second``, ``peak_memory_bytes``. The folder is made for the first of
    them, so that a run that cannot begin leaves nothing behind. Without a folder nothing is written.

    On a terminal a panel shows the newest numbers, drawn by a thread of its own, so that no step waits for it;
    elsewhere a line is printed at each evaluation and whenever ``SILENCE`` has passed.

    ``rows`` are those of an earlier part of the run, which ``folder/metrics.jsonl`` holds already (``keep_rows``).
    ``tokens_per_byte``, of the validation text, gives each row with a ``val_loss`` its ``bits_per_byte``.
    ``flops_per_token`` (``machine.training_flops``) and ``machine_flops`` (``machine.matrix_speed``, FLOP/s) give the
    share of the machine's matrix speed that is in use.
    """

    folder: Path | None
    console: Console
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_byte: float | None = None
    flops_per_token: float | None = None
    machine_flops: float | None = None
    trackers: Sequence[Tracker] = ()

    def __post_init__(self) -> None:
        self._file: TextIO | None = None
        self._panel = LivePanel(self.flops_per_token, self.machine_flops)
        self._live: Live | None = None
        self._spoke = time.monotonic()
        self._latest: dict[str, Any] = {}
        for row in self.rows:
            self._note(row)
        if self.console.is_terminal and not self.console.quiet:
            from rich.live import Live

            self._live = Live(self._panel, console=self.console, refresh_per_second=REFRESHES, transient=True)
            self._live.start()

    def row(self, **values: Any) -> None:
        """Keep one row of metrics and write it down at once. Values that are no numbers (nan, inf) become null."""
        row = {name: _plain(value) for name, value in values.items()}
        if self.tokens_per_byte and row.get("val_loss") is not None:
            row["bits_per_byte"] = bits_per_byte(row["val_loss"], self.tokens_per_byte)
        self._write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        self._note(row)
        for tracker in self.trackers:
            tracker.row(row)

    def progress(self, done: float, seconds_left: float) -> None:
        """Show how far the run is (0 to 1), beside the newest numbers."""
        self._panel.done, self._panel.seconds_left = done, seconds_left
        if not self._live and time.monotonic() - self._spoke > SILENCE:
            self._say("loss", "tokens_per_second")

    def evaluated(self, done: float, seconds_left: float) -> None:
        """Say a line that stays: at each evaluation, on a terminal or not."""
        self._panel.done, self._panel.seconds_left = done, seconds_left
        self._say("loss", "val_loss", "bits_per_byte", *([] if self._live else ["tokens_per_second"]))

    def close(self) -> None:
        """End the panel, the file and the trackers."""
        if self._live:
            self._live.stop()
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

    def _note(self, row: dict[str, Any]) -> None:
        self._latest = self._panel.latest = {**self._latest, **row}
        if row.get("loss") is not None:
            self._panel.curve.add(row["loss"])

    def _say(self, *names: str) -> None:
        """A line of the newest numbers; what the panel shows anyway, it leaves out."""
        self._spoke = time.monotonic()
        parts = [f"{self._panel.done:4.0%}", f"step {self._latest.get('step', 0):,}"]
        parts += [SAID[name].format(self._latest[name]) for name in names if self._latest.get(name) is not None]
        parts += [] if self._live else [f"{clock(self._panel.seconds_left)} left"]
        self.console.print(" · ".join(parts), highlight=False, soft_wrap=True)


def bits_per_byte(val_loss: float, tokens_per_byte: float) -> float:
    """The loss in a unit that does not depend on the tokenizer: nats per token -> bits per byte of UTF-8 text."""
    return val_loss * tokens_per_byte / log(2)


def keep_rows(folder: Path, n: int) -> list[dict[str, Any]]:
    """The first ``n`` rows of ``folder/metrics.jsonl``; what follows them is taken out of the file, all at once.

    What a run wrote after its last checkpoint is not part of the run that goes on from there.
    """
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:n] if file.exists() else []
    atomic_write(file, "".join(lines))
    return [json.loads(line) for line in lines]


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's and MLX's numbers as Python's; nan and the infinities as None."""
    if not isinstance(value, (bool, int, float, str, type(None))):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value
