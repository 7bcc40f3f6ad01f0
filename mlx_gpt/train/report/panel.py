"""The live panel of a run, drawn by a thread of rich from the newest metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from math import isfinite, sqrt
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_gpt.train.units import format_large, format_time

REFRESH_RATE = 3  # Hz
COLUMN = 26  # characters of a label and its value
MAX_WIDTH = 96  # characters; on wider terminals labels would be far from their values
BLOCKS = "▁▂▃▄▅▆▇█"
CELLS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # label, name in a row of metrics, format
    ("loss", "loss", "{:.4f}".format),
    ("validation loss", "val_loss", "{:.4f}".format),
    ("bits per byte", "bits_per_byte", "{:.4f}".format),
    ("learning rate", "learning_rate", "{:.2e}".format),
    ("gradient norm", "grad_norm", "{:.3g}".format),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ("tokens", "tokens", format_large),
    ("of matrix speed", "utilization", "{:.0%}".format),
    ("peak memory", "peak_memory_bytes", partial(format_large, unit="B")),
)


class Curve:
    """A curve of any length as at most ``n`` means over equally many values.

    When it is full, neighbouring means are merged, and each mean is over twice as many values.
    """

    def __init__(self, n: int = 512):
        self.n, self.stride = n, 1
        self.means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Append a value; ignore nan and inf."""
        if not isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.stride:
            return
        self.means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.means) == self.n:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2


def sparkline(values: list[float], width: int) -> str:
    """Draw a curve in at most ``width`` characters, from its minimum to its maximum after the first tenth.

    Heights are square roots, so that the slope of a flat loss remains visible.
    """
    if not values or width < 1:
        return ""
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means[n // 10 :])
    heights = [sqrt(min(1.0, (mean - low) / (high - low))) if high > low else 0.0 for mean in means]
    return "".join(BLOCKS[round(height * (len(BLOCKS) - 1))] for height in heights)


class LivePanel:
    """A renderable for ``rich.live.Live``. Its state is replaced, never changed in place, since it may be drawn."""

    def __init__(self, matrix_tokens_per_second: float | None = None) -> None:
        self.matrix_tokens_per_second = matrix_tokens_per_second
        self.latest: Mapping[str, Any] = {}
        self.curve = Curve()
        self.done, self.seconds_left = 0.0, 0.0
        self._live: Live | None = None

    def start(self, console: Console) -> None:
        """Draw the panel on a terminal until ``stop``."""
        self._live = Live(self, console=console, refresh_per_second=REFRESH_RATE, transient=True)
        self._live.start()

    def stop(self) -> None:
        """Remove the panel."""
        if self._live:
            self._live.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the values of a row of metrics."""
        self.latest = {**self.latest, **row}
        if row.get("loss") is not None:
            self.curve.add(row["loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if "loss" not in self.latest:
            yield Text("starting: the first step compiles the model", style="dim")
            return
        width = min(MAX_WIDTH, options.max_width)
        body = Group(self._progress(), self._numbers(columns=min(3, max(1, width // COLUMN))), self._curve(width - 4))
        yield Panel(body, title="training", title_align="left", border_style="dim", width=width)

    def _progress(self) -> RenderableType:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=1.0, completed=min(1.0, self.done), style="dim", complete_style="cyan")
        left = f"{format_time(self.seconds_left)} left"
        line.add_row(bar, Text(f"{self.done:4.0%}   step {self.latest['step']:,}   {left}", style="bold"))
        return line

    def _numbers(self, columns: int) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="right", no_wrap=True, ratio=1)
            grid.add_column(width=1)  # margin
        cells = self._cells()
        for i in range(0, len(cells), columns):
            grid.add_row(*[text for label, value in cells[i : i + columns] for text in (label, value, "")][:-1])
        return grid

    def _cells(self) -> list[tuple[str, str]]:
        """Labels and values, a dash for a missing one. Utilization: FLOP/s by those of matrix products alone."""
        speed, limit = self.latest.get("tokens_per_second"), self.matrix_tokens_per_second
        values = {**self.latest, "utilization": speed / limit if speed and limit else None}
        return [(label, "–" if values.get(name) is None else form(values[name])) for label, name, form in CELLS]

    def _curve(self, width: int) -> RenderableType:
        return Text.assemble(("loss ", "dim"), (sparkline(self.curve.means, width - 5), "cyan"), no_wrap=True)
