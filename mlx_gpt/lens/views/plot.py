"""Views as heat maps in an image file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.files import atomic_path
from mlx_gpt.lens.views.view import Table, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
FONT, LETTER, LINE, PIXEL, MARGIN = 7, 0.068, 0.2, 0.08, 0.15  # points; inches: a letter, a line, a cell without text
READABLE = 4000  # at most so many cells of a table have text
NARROWEST, LONGEST = 6.0, 400  # inches of a figure's sides


def check_image(name: str) -> None:
    """Raise ``UsageError`` unless a file's name ends as those of images do."""
    suffix = Path(name).suffix
    if suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{name}: a plot's name ends in {', '.join(SUFFIXES)}, {f'not {suffix}' if suffix else 'and this in none'}"
        )


def plot_view(view: View, path: Path) -> None:
    """Draw the tables of a view below each other, as a file. Raises ``OSError``."""
    from matplotlib.figure import Figure  # instead of pyplot, which has global state

    maps = [HeatMap(table) for table in view.tables]
    left = max(h.left for h in maps)
    width = max(NARROWEST, left + max(h.width + h.right for h in maps) + MARGIN)
    text = [
        view.title,
        *(line for part in (view.reading, *view.remarks) for line in wrap(part, int(width / LETTER) - 4)),
    ]
    height = LINE * (len(text) + 1) + sum(h.top + h.height + 2 * LINE for h in maps)
    figure = Figure(figsize=(min(width, LONGEST), min(height, LONGEST)))
    figure.text(
        MARGIN / width,
        1 - MARGIN / height,
        "\n".join(text),
        va="top",
        fontsize=FONT + 1,
        parse_math=False,
        linespacing=1.5,
    )
    y = height - LINE * (len(text) + 1)
    for heat_map in maps:
        y -= heat_map.top + heat_map.height
        heat_map.draw(figure, (left / width, y / height, heat_map.width / width, heat_map.height / height))
        y -= 2 * LINE
    with warnings.catch_warnings(), atomic_path(path) as hidden:
        warnings.filterwarnings("ignore", message="Glyph")  # characters that the font lacks are drawn as boxes
        figure.savefig(hidden, dpi=130, facecolor="white")


@dataclass(frozen=True)
class HeatMap:
    """A table and its measures in inches."""

    table: Table

    @cached_property
    def texts(self) -> list[list[str]]:
        """What the cells show; nothing in a large table."""
        rows, columns = self.table.values.shape
        if rows * columns > READABLE:
            return []
        return [[self.table.cell(row, column) for column in range(columns)] for row in range(rows)]

    @cached_property
    def cell(self) -> float:
        """The width of a cell."""
        return max(LINE, LETTER * (longest(chain(*self.texts)) + 1)) if self.texts else PIXEL

    @cached_property
    def is_upright(self) -> bool:
        """Whether the names of columns are written upwards."""
        return LETTER * (longest(self.table.columns) + 1) > self.cell and len(self.table.columns) > 2

    @property
    def width(self) -> float:
        return self.cell * max(1, len(self.table.columns))

    @property
    def height(self) -> float:
        return (LINE if self.texts else PIXEL) * len(self.table.rows)

    @property
    def left(self) -> float:
        return LETTER * longest(self.table.rows) + 2 * MARGIN

    @property
    def right(self) -> float:
        """The space for notes, or for a title that is longer."""
        title = 1.3 * LETTER * len(self.table.title) - self.width
        return max(title, LETTER * longest(self.table.notes or [""])) + MARGIN

    @property
    def top(self) -> float:
        return 2 * LINE + (LETTER * longest(self.table.columns) if self.is_upright else LINE)

    def draw(self, figure: Figure, place: tuple[float, float, float, float]) -> None:
        """Draw cells, names and notes into a place of the figure."""
        table, shades = self.table, self.table.shades()
        rows, columns = table.values.shape
        axes = figure.add_axes(place)
        is_signed = bool((np.nan_to_num(shades) < 0).any())
        axes.imshow(shades, aspect="auto", cmap="RdBu" if is_signed else "Blues", vmin=-1 if is_signed else 0, vmax=1)
        options: dict[str, Any] = {"fontsize": FONT, "parse_math": False}
        axes.xaxis.tick_top()
        axes.set_xticks(range(columns), table.columns, rotation=90 if self.is_upright else 0, **options)
        axes.set_yticks(range(rows), table.rows, **options)
        if not self.texts:  # a name for some
            for axis, n in ((axes.xaxis, columns), (axes.yaxis, rows)):
                labels = axis.get_ticklabels()
                for i, label in enumerate(labels):
                    label.set_visible(i % max(1, n // 40) == 0)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.annotate(
            table.title if self.texts else f"{table.title}; darkest: {table.format.format(table.largest().max())}",
            (0, 1),
            (0, (self.top - LINE) * 72),
            "axes fraction",
            textcoords="offset points",
            fontweight="bold",
            fontsize=FONT + 1,
            parse_math=False,
        )
        for row, texts in enumerate(self.texts):
            for column, text in enumerate(texts):
                color = "white" if abs(shades[row, column]) > 0.6 else "black"
                axes.text(column, row, text, ha="center", va="center", color=color, **options)
        for row, note in enumerate(table.notes or ()):
            axes.annotate(
                note,
                (columns - 0.5, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
                **options,
            )


def longest(texts: Iterable[str]) -> int:
    """Return the number of letters of the longest text."""
    return max((len(text) for text in texts), default=0)
