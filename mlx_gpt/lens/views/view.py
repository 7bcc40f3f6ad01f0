"""Data of a view: text, and numbers in rows and columns. The terminal, the plot and JSON show the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

Array = np.ndarray
POSITION = "position"  # the axis of tokens, of which a terminal shows the last ones
# The shades of values, from -1 to 1, given the largest absolute value; and the value of a shade.
SCALES: dict[str, tuple[Callable[[Array, Array], Array], Callable[[float, float], float]]] = {
    "share": (lambda x, largest: x, lambda shade, largest: shade),  # 0 to 1
    "amount": (lambda x, largest: x / largest, lambda shade, largest: shade * largest),
    "rank": (lambda x, largest: 1 - np.log10(x) / 4, lambda shade, largest: 10 ** (4 - 4 * shade)),  # 1 is best
}


@dataclass(frozen=True)
class Table:
    """Numbers with the names of their rows and columns."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Array
    """(R, C), NaN where there is none"""
    axes: tuple[str, str] = ("", "")
    """what rows and columns count"""
    texts: Sequence[Sequence[str]] | None = None
    """what a cell shows, if not its number"""
    notes: Sequence[str] | None = None
    """a text at the end of each row"""
    scale: str = "amount"
    """a name in ``SCALES``"""
    by_column: bool = False
    """each column has a scale of its own"""
    format: str = "{:.2f}"
    limits: Array | None = None
    """the largest absolute values of the columns (C,), if not those of this table"""

    def __post_init__(self) -> None:
        assert self.values.shape == (len(self.rows), len(self.columns)), self.title

    def part(self, rows: slice, columns: slice) -> Table:
        """Return some rows and columns, on the scale of the whole."""
        texts = self.texts and [row[columns] for row in self.texts[rows]]
        return replace(
            self,
            rows=self.rows[rows],
            columns=self.columns[columns],
            values=self.values[rows, columns],
            texts=texts,
            notes=self.notes and self.notes[rows],
            limits=self.largest()[columns],
        )

    def shades(self) -> Array:
        """Return how dark each cell is, (R, C) from -1 to 1, negative for values below 0; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(SCALES[self.scale][0](self.values, self.largest()), -1, 1)

    def largest(self) -> Array:
        """Return the largest absolute value of each column, or of all columns for each: (C,)."""
        if self.limits is not None:
            return self.limits
        finite = np.where(np.isfinite(self.values), np.abs(self.values), 0)
        largest = finite.max(axis=0 if self.by_column else None, initial=0)
        return np.broadcast_to(np.where(largest > 0, largest, 1.0), len(self.columns))

    def cell(self, row: int, column: int) -> str:
        """Return what a cell shows."""
        value = self.values[row, column]
        if not np.isfinite(value):
            return ""
        return self.texts[row][column] if self.texts else self.format.format(value)


@dataclass(frozen=True)
class View:
    """A title, a sentence that says how to read the tables, the tables, and remarks about what is in them."""

    title: str
    reading: str
    tables: Sequence[Table]
    remarks: Sequence[str] = ()

    def followed_by(self, other: View) -> View:
        """Return this view with the tables and remarks of another at its end."""
        return replace(self, tables=[*self.tables, *other.tables], remarks=[*self.remarks, *other.remarks])


def as_json(view: View, /, **more: Any) -> str:
    """Format a view for programs: numbers in full, with shapes and names; null where there is no number."""

    def number(x: float) -> float | None:
        return x if isfinite(x) else None

    tables = [
        {
            "title": table.title,
            "axes": table.axes,
            "rows": list(table.rows),
            "columns": list(table.columns),
            "shape": table.values.shape,
            "values": [[number(x) for x in row] for row in table.values.tolist()],
            "texts": table.texts,
            "notes": table.notes,
        }
        for table in view.tables
    ]
    shown = {"title": view.title, "reading": view.reading, "remarks": list(view.remarks), "tables": tables}
    return json.dumps(more | shown, indent=2, allow_nan=False)
