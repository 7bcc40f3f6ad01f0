"""How to train, as one frozen, validated dataclass: the command line's flags are its fields."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

from mlx_gpt.errors import UsageError
from mlx_gpt.train.optimizer import OPTIMIZERS, OptimizerConfig
from mlx_gpt.train.schedule import SCHEDULES

DTYPES = ("float32", "bfloat16", "float16")
COUNTED = ("steps", "tokens", "epochs")  # one of them may say how long a run is
LENGTHS = (*COUNTED, "minutes")
STEPS = 2000  # where none of them does


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """How to train. One of ``steps``, ``tokens``, ``epochs``, or else ``minutes``, says how long.

    Beside one of them ``minutes`` are the most that the steps may take. Where they do not suffice the learning
    rate follows the clock: such a run cannot be repeated to the bit. One that is resumed goes on with the time
    that it has left.
    """

    steps: int | None = None  # optimizer steps; 2000 where nothing says how long
    tokens: int | None = None  # to see, instead of steps
    epochs: float | None = None  # through the training text, instead of steps
    minutes: float | None = None  # of time; beside a number of steps, the most that they may take
    batch_size: int = 8  # B, sequences that are computed at once
    accumulate: int = 1  # batches in a step
    dtype: str = "float32"  # of the computation, or bfloat16 or float16; the weights are float32
    recompute: bool = False  # compute each block again on the way back: less memory, more time
    schedule: str = "cosine"  # or wsd: warm-up, stable, decay
    final_learning_rate: float = 0.1  # at the end, as a share of the peak
    warmup: float = 0.02  # share of the run
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 250  # steps between validation losses; 0 is off
    eval_windows: int = 64  # how many windows a validation loss looks at, the same ones each time; 0 is all
    final_windows: int = 0  # and the last one
    patience: int = 0  # stop after so many validation losses without a new best; 0 is off
    checkpoint_every: int = 250  # steps between checkpoints; 0 is off
    keep: int = 2  # checkpoints, the last ones
    seed: int = 0  # of the weights, the order of the batches and dropout

    def __post_init__(self) -> None:
        given = [name for name in COUNTED if getattr(self, name) is not None]
        if len(given) > 1:
            flags = ", ".join(map(_flag, COUNTED))
            raise UsageError(f"one of {flags} says how long a run is, not {' and '.join(map(_flag, given))}")
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

    def n_steps(self, tokens_per_step: int, tokens_per_epoch: int) -> int | None:
        """How many steps the run has, or None where only the clock says when it ends. At least 1."""
        if self.minutes is not None and all(getattr(self, name) is None for name in COUNTED):
            return None
        if self.tokens is not None:
            return ceil(self.tokens / tokens_per_step)
        if self.epochs is not None:
            return max(1, round(self.epochs * tokens_per_epoch / tokens_per_step))
        return self.steps or STEPS


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
