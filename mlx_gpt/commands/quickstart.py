"""``mlx-gpt quickstart``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Quickstart:
    """Watch a small GPT go from gibberish to readable stories."""

    minutes: float = 3.0
    """how long it may take, everything included"""
    out: Path = Path("runs/quickstart")
    """where the model, the plot and the samples go; a number is appended if it exists"""
    seed: int = 0
    """of the weights, the stories and the samples"""

    def __call__(self) -> None:
        from mlx_gpt.quickstart import quickstart

        quickstart(self.minutes, self.out, self.seed)
