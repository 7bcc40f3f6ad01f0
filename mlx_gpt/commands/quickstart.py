"""``mlx-gpt quickstart``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Quickstart:
    """Train a small GPT in minutes, from gibberish to readable stories."""

    minutes: float = 3.0
    """time limit for everything"""
    out: Path = Path("runs/quickstart")
    """folder for the model, plot and samples; a number is appended if it exists"""
    seed: int = 0
    """random seed of the weights, stories and samples"""
    allow_sleep: bool = False
    """let a Mac fall asleep when it is idle, which stops the training until it wakes"""

    def __call__(self) -> None:
        from mlx_gpt.quickstart import quickstart

        quickstart(self.minutes, self.out, self.seed, self.allow_sleep)
