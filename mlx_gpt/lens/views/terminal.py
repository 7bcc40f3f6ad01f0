"""Views on a terminal: tables whose cells are coloured by their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlx_gpt.lens.views.view import POSITION, SCALES, Table, View

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BOUNDS = (0.1, 0.3, 0.5, 0.7, 0.9)  # lower bounds of the shades that have a colour
# Of 256 colours, which Terminal.app has too: above zero and below it, readable on a dark and on a light background.
ABOVE = ("black on color(153)", "black on color(117)", *(f"bright_white on color({i})" for i in (32, 25, 18)))
BELOW = ("black on color(224)", "black on color(217)", *(f"bright_white on color({i})" for i in (167, 160, 88)))
TOKENS = 24  # the last ones, which are shown even if they need several parts
ROWS, LABEL, CELL = 40, 18, 16  # at most: rows, width of a row's label and of a cell


def print_view(console: Console, view: View) -> None:
    """Print a view. A table that is too wide loses its first positions, or is continued below."""
    from rich.text import Text

    console.print(Text(view.title, "bold"))
    console.print(view.reading, markup=False, highlight=False)
    is_cut = False
    for table in view.tables:
        console.print(Text(f"\n{table.title}", "bold"))
        shown = fitting(table, console.width)
        for columns in blocks(shown, console.width):
            for line in lines(shown, columns):
                is_cut |= console.is_terminal and line.cell_len > console.width
                console.print(line, no_wrap=True, overflow="ellipsis" if console.is_terminal else "ignore", crop=False)
        if console.is_terminal and not console.no_color:
            console.print(legend(table), no_wrap=True)
        if shown.values.shape != table.values.shape:
            console.print(Text(left_out(table, shown), "dim"))
            is_cut = True
    if view.remarks:
        console.print()
    for remark in view.remarks:
        console.print(remark, markup=False, highlight=False)
    if is_cut:
        console.print(Text("\n--json prints all of it, --out plots it.", "dim"))


def fitting(table: Table, width: int) -> Table:
    """Return the part that is shown: the last positions, the first of other rows, all other columns."""
    kept = [ROWS, len(table.columns)]
    if table.axes[1] == POSITION:
        table = table.part(slice(-ROWS if table.axes[0] == POSITION else None, None), slice(-width, None))
        room = width - label_width(table) - np.cumsum([w + 1 for w in reversed(widths(table))])
        kept[1] = max(TOKENS, int((room >= 0).sum()))
        kept[0] = min(kept) if table.axes[0] == POSITION else ROWS
    return table.part(
        *(slice(-n, None) if axis == POSITION else slice(n) for n, axis in zip(kept, table.axes, strict=True))
    )


def left_out(table: Table, shown: Table) -> str:
    """Return a line about the rows and columns that are not shown."""
    parts = [
        f"{here} of {all_} {axis or 'row'}s"
        for here, all_, axis in zip(shown.values.shape, table.values.shape, table.axes, strict=True)
        if here < all_
    ]
    return f"shown: {' and '.join(dict.fromkeys(parts))}"


def blocks(table: Table, width: int) -> Iterator[range]:
    """Yield the columns of each part of a table; parts as wide as fits stand below each other."""
    start, room = 0, width - label_width(table)
    for column, w in enumerate(widths(table)):
        room -= w + 1
        if room < 0 and column > start:
            yield range(start, column)
            start, room = column, width - label_width(table) - w - 1
    yield range(start, len(table.columns))


def label_width(table: Table) -> int:
    """Return the width of the labels of rows."""
    from rich.cells import cell_len

    return min(LABEL, max(map(cell_len, ["", *table.rows])))


def widths(table: Table) -> list[int]:
    """Return the width of each column."""
    from rich.cells import cell_len

    cells = [[table.cell(row, column) for row in range(len(table.rows))] for column in range(len(table.columns))]
    inner = [max(map(cell_len, ["", *column])) for column in cells]
    names = headers(table, inner)
    return [min(CELL, max(w, cell_len(name))) for w, name in zip(inner, names, strict=True)]


def headers(table: Table, inner: Sequence[int]) -> Sequence[str]:
    """Return the names of columns whose cells are so wide; of a position only its number where they are narrow."""
    if table.axes[1] == POSITION and max(inner, default=0) < 5:
        return [name.partition(" ")[0] for name in table.columns]
    return table.columns


def lines(table: Table, columns: range) -> Iterator[Text]:
    """Yield the lines of some columns: their names, then the rows; after the last column the notes."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    label, width, shades = label_width(table), widths(table), table.shades()
    inner = [max(cell_len(table.cell(row, c)) for row in range(len(table.rows))) for c in range(len(table.columns))]

    def fit(text: str, column: int) -> str:
        if cell_len(text) > width[column]:
            text = set_cell_size(text, width[column] - 1) + "…"
        space = " " * (width[column] - cell_len(text))
        return f" {text}{space}" if table.texts and max(inner) > 4 else f" {space}{text}"

    head = Text(" " * label, "dim")
    for c in columns:
        head.append(fit(headers(table, inner)[c], c))
    yield head
    for r, name in enumerate(table.rows):
        line = Text(set_cell_size(name, label))
        for c in columns:
            line.append(fit(table.cell(r, c), c), style_of(shades[r, c]))
        if table.notes and columns.stop == len(table.columns):
            line.append(f"  {table.notes[r]}")
        yield line


def style_of(shade: float) -> str:
    """Return the terminal's style of a shade from -1 to 1."""
    n = sum(abs(shade) >= bound for bound in BOUNDS)
    return "" if not n else (ABOVE if shade > 0 else BELOW)[n - 1]


def legend(table: Table) -> Text:
    """Return a legend of the colours."""
    from rich.text import Text

    has_negative = bool((np.nan_to_num(table.values) < 0).any())
    value, largest = SCALES[table.scale][1], float(table.largest().max(initial=0))
    line = Text().append("from ", "dim")
    for bound in [*(-bound for bound in reversed(BOUNDS) if has_negative), *BOUNDS]:
        text = f"{bound:.0%}" if table.by_column else f"{value(bound, largest):.3g}"
        line.append(f" {text} ", style_of(bound))
    return line.append(" of the column's largest" if table.by_column else "", "dim")
