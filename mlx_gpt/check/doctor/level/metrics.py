"""Read a training log, in which keys may be missing, values may be no numbers, and a run may start again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case

Rows = list[dict[str, float]]


def metrics(case: Case) -> Rows:
    """Return the rows of ``metrics``; none if it is not given."""
    return numbers(case.given.get("metrics", []))


def numbers(rows: Iterable[Any]) -> Rows:
    """Return the rows that have a step, without values that are not finite numbers."""
    kept = [finite(row) for row in rows if isinstance(row, Mapping)]
    return [row for row in kept if "step" in row]


def finite(row: Mapping[str, Any]) -> dict[str, float]:
    kept = {}
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if isfinite(number):
            kept[str(name)] = number
    return kept


def curve(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of one column, (n,) each, since the last start of the run."""
    points = np.array([(row["step"], row[name]) for row in rows if name in row], np.float64).reshape(-1, 2)
    restarts = np.flatnonzero(np.diff(points[:, 0]) < 0)
    points = points[restarts[-1] + 1 :] if len(restarts) else points
    return points[:, 0], points[:, 1]
