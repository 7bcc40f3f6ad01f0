"""The rows of a training log, as they are: cut off, with keys missing, or not finite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable

Rows = list[dict[str, float]]


def metrics(case: Case) -> Rows:
    """Return the rows of ``metrics``. Raises ``NotApplicable`` if there is none."""
    given = case.given.get("metrics")
    if given is None:
        raise NotApplicable("metrics")
    if rows := read_metrics(given):
        return rows
    raise NotApplicable("metrics with rows that have a step")


def read_metrics(given: Any) -> Rows:
    """Return the rows that have a step, with their finite numbers, in order; what else a log holds is dropped.

    ``given`` is the path of a file with a JSON object in each line, or a sequence of dicts.
    """
    if isinstance(given, (str, Path)):
        try:
            lines = Path(given).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        given = [parsed(line) for line in lines]
    rows = [finite(row) for row in given if isinstance(row, Mapping)]
    return [row for row in rows if "step" in row]


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def finite(row: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if isfinite(number):
            found[str(name)] = number
    return found


def curve(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of the rows that have a value, (n,) each, from the last start of the run on."""
    points = np.array([(row["step"], row[name]) for row in rows if name in row], np.float64).reshape(-1, 2)
    restarts = np.flatnonzero(np.diff(points[:, 0]) < 0)
    points = points[restarts[-1] + 1 :] if len(restarts) else points
    return points[:, 0], points[:, 1]
