"""The parts of an evaluation task: how to read its data, how to measure a model on it, and the public data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Metrics = dict[str, tuple[float, float | None]]  # name: value, standard error


@dataclass(frozen=True)
class Evaluation:
    """Metrics over ``n`` scored tokens, passages or questions, and the settings that they depend on."""

    metrics: Metrics
    n: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An evaluation. To add one, write a file like ``lambada.py`` and enter it in ``evaluate.TASKS``."""

    repository: str  # of the public data set, on the hub
    file: str  # in that repository
    read: Callable[[Path], Any]  # returns the data; raises DataError
    measure: Callable[..., Evaluation]  # (model, tokenizer, data, on_scored, **settings)
    settings: tuple[str, ...] = ()  # the names of the flags that ``measure`` takes
