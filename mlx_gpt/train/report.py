"""What a run says while it trains: a live line, ``metrics.jsonl`` and the plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Report:
    """Collects a run's metrics: in memory, in ``folder/metrics.jsonl`` and on the console's last line.

    Rows have ``step``, ``tokens`` and, where measured, ``loss`` and ``val_loss`` (nats per token), ``learning_rate``,
    ``grad_norm``, ``tokens_per_second``, ``peak_memory_bytes``. The folder is made for the first of them, so that a run
    that cannot begin leaves nothing behind.
    """

    folder: Path
    console: Console
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file: TextIO | None = None
        self._status = self.console.status("starting: the first step compiles the model") if self._live else None
        if self._status:
            self._status.start()

    @property
    def _live(self) -> bool:
        return self.console.is_terminal

    def row(self, **values: Any) -> None:
        """Keep one row of metrics and write it down at once."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "metrics.jsonl").open("a" if self.rows else "w", encoding="utf-8")
        self.rows.append(values)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def progress(self, done: float, seconds_left: float) -> None:
        """Show how far the run is, from the newest rows."""
        if self._status:
            self._status.update(self._line(done, seconds_left))

    def evaluated(self, done: float, seconds_left: float) -> None:
        """Say a line that stays: at each evaluation, on a terminal or not."""
        self.console.print(self._line(done, seconds_left), highlight=False)

    def close(self) -> None:
        """End the live line and the file."""
        if self._status:
            self._status.stop()
        if self._file:
            self._file.close()

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def _line(self, done: float, seconds_left: float) -> str:
        loss, val_loss, speed = self.last("loss"), self.last("val_loss"), self.last("tokens_per_second")
        parts = [f"{done:4.0%}", f"step {self.last('step') or 0}"]
        parts += [f"loss {loss:.3f}"] if loss is not None else []
        parts += [f"validation {val_loss:.3f}"] if val_loss is not None else []
        parts += [f"{speed:,.0f} tokens/s"] if speed is not None else []
        return " · ".join([*parts, f"{_clock(seconds_left)} left"])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def plot_loss(rows: Sequence[dict[str, Any]], marks: dict[str, float], path: Path, title: str) -> None:
    """Draw the losses over the tokens seen, with a line for each mark (name -> nats per token), as a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        "loss": {"label": "training", "color": "0.75", "linewidth": 0.8},
        "val_loss": {"label": "validation", "color": "tab:blue", "marker": "o", "markersize": 3.5},
    }
    for name, style in styles.items():
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        axes.plot([tokens for tokens, _ in points], [loss for _, loss in points], **style)
    for name, loss in marks.items():
        axes.axhline(loss, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -10 if loss == min(marks.values()) else 3),  # the curve comes down to the lowest one
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.9))
    figure.savefig(path, dpi=150)
