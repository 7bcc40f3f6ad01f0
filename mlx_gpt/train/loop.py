"""The training loop: steps, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from math import isfinite
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.device import first_reported
from mlx_gpt.errors import MLXGPTError, Stopped, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import (
    Checkpoint,
    CheckpointManager,
    RunProgress,
    random_keys,
    restore_optimizer,
    restore_random_key,
)
from mlx_gpt.store.run_lock import locked
from mlx_gpt.text.batches import Batches
from mlx_gpt.text.windows import TokenStream, Windows
from mlx_gpt.train.clock import Clock
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import rank, size
from mlx_gpt.train.extension import extend
from mlx_gpt.train.gradient import largest_gradient
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.report.metrics import RunReport
from mlx_gpt.train.schedule import Schedule
from mlx_gpt.train.signals import deferred
from mlx_gpt.train.step import make_eval_step, make_train_step
from mlx_gpt.train.validation import evaluate

OnEval = Callable[[int, float], None]


class Pending(NamedTuple):
    """A step that has been started and not yet reported."""

    step: int
    loss: mx.array
    norm: mx.array  # of the gradient, before clipping
    stop: mx.array | None
    learning_rate: float
    batch: tuple[mx.array, mx.array]


class Trainer:
    """A training run. Invalid settings are refused before anything is written.

    ``on_eval(step, share of the run)`` is called after each evaluation, with the model in evaluation mode.
    ``checkpoints`` saves checkpoints and the best model; with it a signal ends the run after the current step and
    a checkpoint, and the model ends as the better of the best and the last one. ``start`` is the checkpoint to resume
    from, with this model. In a ``group`` each process computes its own rows of a batch.
    """

    def __init__(
        self,
        model: GPT,
        train_stream: TokenStream,
        val_stream: TokenStream,
        config: TrainConfig,
        report: RunReport,
        on_eval: OnEval | None = None,
        checkpoints: CheckpointManager | None = None,
        start: Checkpoint | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.config, self.report, self.on_eval = model, config, report, on_eval
        self.checkpoints, self.group = checkpoints, group
        self.progress = start.progress if start else RunProgress()
        T, B = model.config.n_positions, config.batch_size
        self.windows = Windows.over(val_stream, min(T, val_stream.n_tokens))
        self.batches = Batches(train_stream, T, B, config.seed, self.progress.position, rank(group), size(group))
        self.tokens_per_step = size(group) * config.accumulate * B * T
        if config.minutes is not None and group:
            raise UsageError("--minutes is for one process, since each has its own clock; give --steps")

        def clock(config: TrainConfig) -> Clock:
            n_steps = config.n_steps(self.tokens_per_step, train_stream.n_tokens)
            return Clock(n_steps, config.minutes, self.progress.seconds)

        self.clock = clock(config)
        self.optimizer = make_optimizer(config, model.config.n_head)
        settings = config.schedule, config.warmup, config.final_learning_rate, self.progress.extended
        self.schedule = Schedule(self.optimizer, *settings)
        self.extension = extend(self.progress, config, clock, self.schedule)
        self._restore_state(start)
        self.step, self.state = make_train_step(model, self.optimizer, config, group)
        self.eval_step = make_eval_step(model)
        self.pending: Pending | None = None
        self.interrupted: Callable[[], int] = lambda: 0  # the signal that this process received, or 0
        self.stop = 0  # that any process of the group received

    def _restore_state(self, start: Checkpoint | None) -> None:
        """Set optimizer and random state, before the step is compiled."""
        n = size(self.group)
        if start is None:
            if rank(self.group):  # each process has the same weights and its own dropout
                mx.random.seed((self.config.seed + rank(self.group)) % 2**64)
            return
        if len(start.progress.random) != n:
            raise UsageError(
                f"the run was trained by {len(start.progress.random)} processes, not {n}; resume it with as many"
            )
        restore_optimizer(self.optimizer, self.model, start.optimizer)
        restore_random_key(start.progress.random[rank(self.group)])

    def run(self) -> float:
        """Train to the end of the run and return the validation loss of the final model.

        Raises ``MLXGPTError`` if the loss is not finite, ``Stopped`` after a signal (``signals.py``), and
        ``FolderInUseError`` if another process or thread trains in the run's folder.
        """
        wanted = bool(self.checkpoints or self.group)
        if self._finished():
            self.report.console.print(
                f"the run is finished at step {self.progress.step:,}: nothing is trained; --steps M, a higher total, "
                f"extends it",
                highlight=False,
                soft_wrap=True,
            )
        with ExitStack() as stack:
            for folder in filter(None, (self.report.folder, self.checkpoints.run if self.checkpoints else None)):
                stack.enter_context(locked(folder))
            with closing(self.batches), deferred(wanted) as self.interrupted:
                self._train()
            self.synchronize()
            return self._finish()

    def _train(self) -> None:
        if self.config.checkpoint_every and not self.progress.step:
            self.save_checkpoint()
        while not self._finished():
            self.advance()
            if self._is_due(self.config.eval_every) and not self._finished():
                self.evaluate()
            stop, last = self._stopped(), self._finished() and self.config.checkpoint_every
            if stop or last or self._is_due(self.config.checkpoint_every):
                self.save_checkpoint()
            if stop:
                raise Stopped(stop, self._stopped_message())

    def _finished(self) -> bool:
        stopped_early = 0 < self.config.patience <= self.progress.stale
        return stopped_early or self.clock.done(self.progress.step) >= 1

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def advance(self) -> None:
        """Start a step and report the previous one while it runs."""
        learning_rate = self.schedule.set(self.clock.done(self.progress.step + 1))
        x, y = map(mx.array, self.batches.for_step(self.config.accumulate))
        loss, norm = self.step(x, y)
        stop = mx.distributed.all_max(mx.array(self.interrupted()), group=self.group) if self.group else None
        with first_reported("step"):
            mx.async_eval(loss, norm, stop, self.state)
        self.synchronize()
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.position = self.batches.position
        self.pending = Pending(self.progress.step, loss, norm, stop, learning_rate, (x, y))

    def synchronize(self) -> None:
        """Wait for the step in progress and report it."""
        if self.pending is None:
            return
        step, *results, stop, learning_rate, batch = self.pending
        self.pending = None
        loss, norm = (float(np.array(value)) for value in results)
        if not (isfinite(loss) and isfinite(norm)):
            raise MLXGPTError(self._divergence_message(step, loss, norm, batch))
        self.stop = 0 if stop is None else int(np.array(stop))
        tokens = step * self.tokens_per_step
        self.report.row(
            step=step,
            tokens=tokens,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens_per_second=tokens / self.clock.seconds(),
            peak_memory_bytes=mx.get_peak_memory(),
        )
        self.report.progress(self.clock.done(step), self.clock.left(step))

    def _stopped(self) -> int:
        """Return the signal that ends the run, or 0; in a group all processes stop after the same step."""
        return self.stop if self.group else self.interrupted()

    def evaluate(self) -> None:
        """Compute the validation loss on some windows, save the model if it is the best, and call ``on_eval``."""
        self.synchronize()
        progress, n = self.progress, self.progress.step
        with self.clock.paused():
            val_loss = self._val_loss(self.config.eval_windows)
            self._report_val_loss(val_loss)
            progress.stale += 1
            if progress.best_val_loss is None or val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step, progress.stale = val_loss, n, 0
                if self.checkpoints:
                    self.checkpoints.export(self.model)
            self.report.evaluated(self.clock.done(n), self.clock.left(n))
            if self.on_eval:
                self.model.eval()
                self.on_eval(n, self.clock.done(n))
                self.model.train()

    def _val_loss(self, n_windows: int = 0) -> float:
        return evaluate(self.model, self.eval_step, self.windows, self.config.batch_size, n_windows, self.group)

    def _report_val_loss(self, val_loss: float) -> None:
        self.report.row(step=self.progress.step, tokens=self.progress.tokens, val_loss=val_loss)

    def save_checkpoint(self) -> None:
        """Save a checkpoint that the run can be resumed from."""
        self.synchronize()
        self.progress.rows = len(self.report.rows)
        self.progress.seconds = self.clock.seconds()
        self.progress.random = random_keys(self.group)
        if self.checkpoints:
            with self.clock.paused():
                self.checkpoints.save(self.model, self.optimizer, self.progress)

    def _finish(self) -> float:
        """Compute the final validation loss and keep the final model, or the best one if that is better."""
        self.model.eval()
        val_loss = self._val_loss(self.config.final_windows)
        self._report_val_loss(val_loss)
        self.report.evaluated(1.0, 0.0)
        best = self.progress.best_val_loss
        is_best = best is None or self._val_loss(self.config.eval_windows) < best
        if self.checkpoints:
            if not is_best and (best_loss := self._try_best(val_loss)) < val_loss:
                return best_loss
            self.checkpoints.export(self.model)
        return val_loss

    def _try_best(self, val_loss: float) -> float:
        """Return the validation loss of the best saved model; load its weights if that is below ``val_loss``."""
        assert self.checkpoints
        last = self.model.parameters()
        self.model.update(self.checkpoints.best().parameters())
        best_loss = evaluate(
            self.model, self.eval_step, self.windows, self.config.batch_size, self.config.final_windows
        )
        if best_loss < val_loss:
            self.report.console.print(
                f"the model is that of step {self.progress.best_step}: validation {best_loss:.4f}, "
                f"and {val_loss:.4f} after the last step",
                highlight=False,
            )
        else:
            self.model.update(last)
        return best_loss

    def _stopped_message(self) -> str:
        remedy = f"; resume with: mlx-gpt train --resume {self.checkpoints.run}" if self.checkpoints else ""
        return f"stopped after step {self.progress.step}{remedy}"

    def _divergence_message(self, step: int, loss: float, norm: float, batch: tuple[mx.array, mx.array]) -> str:
        what = f"the loss became {loss}" if not isfinite(loss) else f"the gradient's norm became {norm}"
        name, value = largest_gradient(self.model, *batch)
        half = "float16 ends at 65504, which --dtype bfloat16 does not; or " if self.config.dtype == "float16" else ""
        kept = self.checkpoints.newest() if self.checkpoints else None
        again = f"; to continue from the last checkpoint with another setting: --init {kept}" if kept else ""
        return (
            f"{what} at step {step} (largest gradient: {name}, {value:g}); {half}a lower --learning-rate "
            f"(it was {self.config.learning_rate:g}) or a longer --warmup usually helps{again}"
        )
