"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, inf
from typing import Any

from mlx_gpt.errors import UsageError
from mlx_gpt.train.optimizer import OPTIMIZERS, OptimizerConfig
from mlx_gpt.train.schedule import SCHEDULES

DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = ("steps", "tokens", "epochs")
LIMITS = (*LENGTHS, "minutes")
DEFAULT_STEPS = 2000


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """The settings of a training run: each field is a flag of ``mlx-gpt train``, its comment the flag's help.

    One of ``steps``, ``tokens`` and ``epochs``, or ``minutes`` alone, sets the length of the run. Beside another length
    ``minutes`` limits the time of the steps: if they would take longer, the learning rate follows the clock, and the
    run is not reproducible to the bit. A resumed run has the time that is left of it.
    """

    steps: int | None = None  # optimizer steps
    tokens: int | None = None  # tokens to train on, instead of steps
    epochs: float | None = None  # passes over the training text, instead of steps
    minutes: float | None = None  # time to train; beside steps, tokens or epochs a limit on it
    batch_size: int = 8  # B, sequences in a batch
    accumulate: int = 1  # batches in a step
    dtype: str = "float32"  # of activations: float32, bfloat16 or float16; weights are float32
    recompute: bool = False  # recompute each block in the backward pass: less memory, more time
    schedule: str = "cosine"  # of the learning rate: cosine, or wsd (warmup, stable, decay)
    final_learning_rate: float = 0.1  # at the end of the run, as a share of the peak
    warmup: float = 0.02  # share of the run
    grad_clip: float = 1.0  # maximum norm of the gradient
    eval_every: int = 250  # steps between validation losses; 0: never
    eval_windows: int = 64  # windows of the validation text in a validation loss, always the same; 0: all
    final_windows: int = 0  # windows in the last validation loss; 0: all
    patience: int = 0  # stop after so many validation losses without improvement; 0: never
    checkpoint_every: int = 250  # steps between checkpoints; 0: none
    keep: int = 2  # newest checkpoints to keep
    seed: int = 0  # of the initial weights, the order of batches and dropout

    def __post_init__(self) -> None:
        given = [_flag(name) for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"give one of {', '.join(map(_flag, LENGTHS))}, not {' and '.join(given)}")
        for name in ("steps", "tokens", "batch_size", "accumulate", "muon_iterations", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs", "minutes", "learning_rate", "muon_learning_rate", "grad_clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < inf:
                raise UsageError(f"{_flag(name)} must be a number above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "eval_every", "eval_windows", "final_windows", "patience", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{_flag(name)} must be 0 or above, not {getattr(self, name)}")
        for name in ("warmup", "final_learning_rate", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)} must be in [0, 1), not {getattr(self, name)}")
        for name, choices in (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{_flag(name)} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed must be 0 or above and below 2^64, not {self.seed}")
        if self.patience and not self.eval_every:
            raise UsageError("--patience needs validation losses: give --eval-every above 0")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Return the training settings among the settings of a run."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    @property
    def length(self) -> dict[str, float]:
        """Return those settings that set the length of the run."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def n_steps(self, tokens_per_step: int, tokens_per_epoch: int) -> int | None:
        """Return the number of steps, at least 1, or None if only ``minutes`` sets the length."""
        if self.tokens is not None:
            return ceil(self.tokens / tokens_per_step)
        if self.epochs is not None:
            return max(1, round(self.epochs * tokens_per_epoch / tokens_per_step))
        return self.steps if self.minutes is not None else self.steps or DEFAULT_STEPS


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
