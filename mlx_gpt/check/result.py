"""One line of a report: the name of a check, the value measured, its tolerance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``holds`` is None for a skipped check; ``remark`` then gives the reason, else the unit or place of the figure."""

    what: str
    figure: float | None
    tolerance: float | None
    holds: bool | None
    remark: str = ""

    def __str__(self) -> str:
        figure = "" if self.figure is None else f" is {self.figure:.2g}, tolerance {self.tolerance:.2g}"
        return f"{self.what}{figure}; {self.remark}".rstrip("; ")


def measured(what: str, figure: float, tolerance: float, remark: str = "") -> Check:
    """Check that a figure is at most the tolerance. NaN fails."""
    return Check(what, float(figure), float(tolerance), bool(figure <= tolerance), remark)


def skipped(what: str, why: str) -> Check:
    return Check(what, None, None, None, why)
