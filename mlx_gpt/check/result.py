"""One line of a report: what was checked, the figure, what it may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``holds`` is None where it was not checked; ``remark`` then says why, and else what the figure is, or where."""

    what: str
    figure: float | None
    tolerance: float | None
    holds: bool | None
    remark: str = ""

    def __str__(self) -> str:
        figure = "" if self.figure is None else f" is {self.figure:.2g} and may be {self.tolerance:.2g}"
        return f"{self.what}{figure}; {self.remark}".rstrip("; ")


def measured(what: str, figure: float, tolerance: float, remark: str = "") -> Check:
    """A figure that may be at most the tolerance; no number is never right."""
    return Check(what, float(figure), float(tolerance), bool(figure <= tolerance), remark)


def skipped(what: str, why: str) -> Check:
    return Check(what, None, None, None, why)
