"""The training loop: batches in, a trained model out, and a look at it now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.shards import TokenStream, Windows, endless_batches
from mlx_gpt.train.optimizer import OPTIMIZERS, SCHEDULES, Schedule, make_optimizer
from mlx_gpt.train.report import Report
from mlx_gpt.train.step import EvalStep, make_eval_step, make_train_step


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The run ends after ``steps``, or after ``minutes`` where those are given."""

    steps: int = 2000  # optimizer steps
    minutes: float | None = None  # wall time, instead of steps
    batch_size: int = 8  # B, sequences in a step
    optimizer: str = "adamw"  # or muon
    learning_rate: float = 1e-3  # peak, of AdamW
    muon_learning_rate: float = 0.02  # peak, of Muon, where it is used
    muon_embeddings: bool = False  # the token embedding is Muon's too
    muon_iterations: int = 5  # of Newton-Schulz in Muon; fewer are faster and less exact
    schedule: str = "cosine"  # or wsd: warm-up, stable, decay
    final_learning_rate: float = 0.1  # at the end, as a share of the peak
    warmup: float = 0.02  # share of the run
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 250  # steps between validation losses; 0 is off
    eval_windows: int = 64  # how many windows a validation loss looks at, the same ones each time; 0 is all
    seed: int = 0  # of the weights, the order of the batches and dropout

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "muon_iterations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{_flag(name)} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "eval_every", "eval_windows", "seed"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{_flag(name)} must be 0 or above, not {getattr(self, name)}")
        for name in ("warmup", "final_learning_rate", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)} must be in [0, 1), not {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"--minutes must be above 0, not {self.minutes}")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"--schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def evaluate(model: GPT, step: EvalStep, windows: Windows, batch_size: int, n_windows: int = 0) -> float:
    """The validation loss: mean nats per token over the counted targets of ``n_windows`` (0: all), evenly spread.

    ``step`` is what ``make_eval_step(model)`` returned, to be made once for a run. Dropout is off meanwhile.
    """
    was_training = model.training
    model.eval()
    n = min(n_windows or len(windows), len(windows))
    rows = np.linspace(0, len(windows) - 1, n).round().astype(int)
    total, count = 0.0, 0
    for i in range(0, n, batch_size):
        x, y, counts = windows.batch(rows[i : i + batch_size])
        total += float(step(mx.array(x), mx.array(y), mx.array(counts)).item())  # type: ignore[arg-type]
        count += int(counts.sum())
    model.train(was_training)
    return total / count


def train(
    model: GPT,
    train_stream: TokenStream,
    val_stream: TokenStream,
    config: TrainConfig,
    report: Report,
    on_eval: Callable[[int, float], None] | None = None,
) -> float:
    """Train the model in place; returns the last validation loss, over all of the validation text.

    ``on_eval(step, share done)`` is called after each evaluation, with the model in eval mode: the place to show
    samples. Raises ``MLXGPTError`` when the loss is no longer a number.
    """
    T = model.config.n_positions
    windows = Windows.over(val_stream, min(T, val_stream.n_tokens))
    batches = endless_batches(train_stream, T, config.batch_size, config.seed)
    optimizer = make_optimizer(
        config.optimizer,
        config.learning_rate,
        config.muon_learning_rate,
        config.weight_decay,
        (config.beta1, config.beta2),
        config.muon_embeddings,
        config.muon_iterations,
    )
    schedule = Schedule(optimizer, config.schedule, config.warmup, config.final_learning_rate)
    step = make_train_step(model, optimizer, config.grad_clip, config.batch_size)
    eval_step = make_eval_step(model)
    clock = _Clock(config)
    n = 0
    while (done := clock.done(n)) < 1:
        if config.eval_every and n and n % config.eval_every == 0:
            clock.pause()
            val_loss = evaluate(model, eval_step, windows, config.batch_size, config.eval_windows)
            report.row(step=n, tokens=n * config.batch_size * T, val_loss=val_loss)
            report.evaluated(done, clock.left(n))
            if on_eval:
                model.eval()
                on_eval(n, done)
                model.train()
            clock.resume()
        learning_rate = schedule.set(clock.done(n + 1))
        x, y = next(batches)
        loss, norm = step(mx.array(x), mx.array(y))
        mx.eval(loss, norm, step.state)
        n += 1
        if not np.isfinite(loss.item()):
            raise MLXGPTError(
                f"the loss became {loss.item()} at step {n}; a lower --learning-rate (it was {config.learning_rate:g}) "
                f"or a longer --warmup usually helps"
            )
        report.row(
            step=n,
            tokens=n * config.batch_size * T,
            loss=loss.item(),
            learning_rate=learning_rate,
            grad_norm=norm.item(),
            tokens_per_second=n * config.batch_size * T / clock.seconds(),
            peak_memory_bytes=mx.get_peak_memory(),
        )
        report.progress(clock.done(n), clock.left(n))
    model.eval()
    val_loss = evaluate(model, eval_step, windows, config.batch_size)
    report.row(step=n, tokens=n * config.batch_size * T, val_loss=val_loss)
    report.evaluated(1.0, 0.0)
    return val_loss


class _Clock:
    """How much of the run is done: by steps, or by the time spent on steps."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.started = time.perf_counter()
        self.paused = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def pause(self) -> None:
        self._since = time.perf_counter()

    def resume(self) -> None:
        self.paused += time.perf_counter() - self._since

    def done(self, n: int) -> float:
        if self.config.minutes is None:
            return n / self.config.steps
        return self.seconds() / (60 * self.config.minutes)

    def left(self, n: int) -> float:
        """Seconds left, without evaluations."""
        done = self.done(n)
        return self.seconds() * (1 - done) / done if done else 0.0
