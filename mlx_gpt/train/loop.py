"""The training loop: batches in, a trained model out, and on the way a look at it and a copy of it now and then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from math import isfinite
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import (
    Checkpoint,
    CheckpointManager,
    RunProgress,
    random_keys,
    restore_optimizer,
    restore_random_key,
)
from mlx_gpt.text.batches import Batches
from mlx_gpt.text.windows import TokenStream, Windows
from mlx_gpt.train.clock import Clock, deferred_ctrl_c
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import rank, size
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.report.metrics import Report
from mlx_gpt.train.schedule import Schedule
from mlx_gpt.train.step import TrainStep, largest_gradient, make_eval_step, make_train_step
from mlx_gpt.train.validation import evaluate

OnEval = Callable[[int, float], None]


class Pending(NamedTuple):
    """A step that has been started: the arrays it will fill, and what it was given."""

    step: int
    measured: tuple[mx.array, mx.array]  # loss, norm of the gradient
    stop: mx.array | None
    learning_rate: float
    batch: tuple[np.ndarray, np.ndarray]


class Trainer:
    """A training run. All is set up, and what cannot work is refused, before anything is written.

    ``on_eval(step, share done)`` is called after each evaluation, with the model in eval mode: the place to show
    samples. ``keeper`` is where checkpoints and the best model go; with it Ctrl-C ends the run after the step and a
    checkpoint, and the model ends as the better of the best on the way and the last. ``start`` is the checkpoint to
    go on from, whose model this is. In a ``group`` every process has its own rows of a batch.
    """

    def __init__(
        self,
        model: GPT,
        train_stream: TokenStream,
        val_stream: TokenStream,
        config: TrainConfig,
        report: Report,
        on_eval: OnEval | None = None,
        keeper: CheckpointManager | None = None,
        start: Checkpoint | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.config, self.report, self.on_eval = model, config, report, on_eval
        self.keeper, self.group = keeper, group
        self.progress = start.progress if start else RunProgress()
        T, B = model.config.n_positions, config.batch_size
        self.windows = Windows.over(val_stream, min(T, val_stream.n_tokens))
        self.batches = Batches(train_stream, T, B, config.seed, self.progress.position, rank(group), size(group))
        self.tokens_per_step = size(group) * config.accumulate * B * T
        n_steps = config.n_steps(self.tokens_per_step, train_stream.n_tokens)
        if config.minutes is not None and group:
            raise UsageError("--minutes is for one process, since each has its own clock; give --steps")
        self.clock = Clock(n_steps, config.minutes, self.progress.seconds)
        self.optimizer = make_optimizer(config, model.config.n_head)
        self.schedule = Schedule(self.optimizer, config.schedule, config.warmup, config.final_learning_rate)
        self._set_state(start)
        self.step = make_step(model, self.optimizer, config, group)
        self.eval_step = make_eval_step(model)
        self.pending: Pending | None = None
        self.asked: Callable[[], bool] = lambda: False  # whether Ctrl-C was pressed
        self.stop = False  # whether it was in any process of the group

    def _set_state(self, start: Checkpoint | None) -> None:
        """Optimizer and random state, before the step is compiled."""
        me, all_of_us = rank(self.group), size(self.group)
        if start is None:
            if me:  # the same weights everywhere, but not the same dropout
                mx.random.seed((self.config.seed + me) % 2**64)
            return
        if len(start.progress.random) != all_of_us:
            raise UsageError(
                f"the run was trained by {len(start.progress.random)} processes, and these are {all_of_us}; "
                f"resume it with as many"
            )
        restore_optimizer(self.optimizer, self.model, start.optimizer)
        restore_random_key(start.progress.random[me])

    def run(self) -> float:
        """All steps from where the run stands; returns the validation loss, over all of the text, of what is left.

        Raises ``MLXGPTError`` when the loss is no longer a number, ``KeyboardInterrupt`` after Ctrl-C.
        """
        with closing(self.batches), deferred_ctrl_c(bool(self.keeper or self.group)) as self.asked:
            if self.config.checkpoint_every and not self.progress.step:
                self.keep()  # so that a run can be resumed from its first moment
            while not self._finished():
                self.advance()
                if self._is_due(self.config.eval_every) and not self._finished():
                    self.look()
                stop, last = self._stopped(), self._finished() and self.config.checkpoint_every
                if stop or last or self._is_due(self.config.checkpoint_every):
                    self.keep()
                if stop:
                    raise KeyboardInterrupt(self._how_to_go_on())
        self.settle()
        return self._finish()

    def _finished(self) -> bool:
        gave_up = 0 < self.config.patience <= self.progress.stale
        return gave_up or self.clock.done(self.progress.step) >= 1

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def advance(self) -> None:
        """Start a step and, while it runs, write down the one before."""
        learning_rate = self.schedule.set(self.clock.done(self.progress.step + 1))
        batch = self.batches.for_step(self.config.accumulate)
        loss, norm = self.step(*batch)
        stop = mx.distributed.all_sum(mx.array(int(self.asked())), group=self.group) if self.group else None
        mx.async_eval(loss, norm, stop, self.step.state)
        self.settle()
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.position = self.batches.position
        self.pending = Pending(self.progress.step, (loss, norm), stop, learning_rate, batch)

    def settle(self) -> None:
        """Wait for the step that was started last, and write it down."""
        if self.pending is None:
            return
        step, measured, stop, learning_rate, batch = self.pending
        self.pending = None
        loss, norm = (float(np.array(value)) for value in measured)
        if not (isfinite(loss) and isfinite(norm)):
            raise MLXGPTError(self._what_broke(step, loss, norm, batch))
        self.stop = stop is not None and bool(stop.item())
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

    def _stopped(self) -> bool:
        """Whether Ctrl-C was pressed; in a group, once all have heard of it, so that all stop after the same step."""
        return self.stop if self.group else self.asked()

    def look(self) -> None:
        """Measure the validation loss on some windows, keep the model if it is the best yet, and show samples."""
        self.settle()
        progress, n = self.progress, self.progress.step
        with self.clock.paused():
            val_loss = self._measure(self.config.eval_windows)
            self._write_down(val_loss)
            progress.stale += 1
            if progress.best_val_loss is None or val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step, progress.stale = val_loss, n, 0
                if self.keeper:
                    self.keeper.export(self.model)
            self.report.evaluated(self.clock.done(n), self.clock.left(n))
            if self.on_eval:
                self.model.eval()
                self.on_eval(n, self.clock.done(n))
                self.model.train()

    def _measure(self, n_windows: int = 0) -> float:
        return evaluate(self.model, self.eval_step, self.windows, self.config.batch_size, n_windows, self.group)

    def _write_down(self, val_loss: float) -> None:
        self.report.row(step=self.progress.step, tokens=self.progress.tokens, val_loss=val_loss)

    def keep(self) -> None:
        """Write a checkpoint, from which a run goes on with its next step."""
        self.settle()
        self.progress.rows = len(self.report.rows)
        self.progress.seconds = self.clock.seconds()
        self.progress.random = random_keys(self.group)
        if self.keeper:
            with self.clock.paused():
                self.keeper.save(self.model, self.optimizer, self.progress)

    def _finish(self) -> float:
        """Measure the last weights, usually on all of the validation text; leave them, or the best if better."""
        self.model.eval()
        val_loss = self._measure(self.config.final_windows)
        self._write_down(val_loss)
        self.report.evaluated(1.0, 0.0)
        best = self.progress.best_val_loss
        beaten = best is None or self._measure(self.config.eval_windows) < best
        if self.keeper:
            if not beaten and (best_loss := self._try_best(val_loss)) < val_loss:
                return best_loss
            self.keeper.export(self.model)
        return val_loss

    def _try_best(self, val_loss: float) -> float:
        """The validation loss of the best model on the way, which the model becomes if it is below ``val_loss``."""
        assert self.keeper
        last = self.model.parameters()
        self.model.update(self.keeper.best().parameters())
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

    def _how_to_go_on(self) -> str:
        way_on = f"; go on with: mlx-gpt train --resume {self.keeper.run}" if self.keeper else ""
        return f"stopped after step {self.progress.step}{way_on}"

    def _what_broke(self, step: int, loss: float, norm: float, batch: tuple[np.ndarray, np.ndarray]) -> str:
        what = f"the loss became {loss}" if not isfinite(loss) else f"the gradient's norm became {norm}"
        name, value = largest_gradient(self.model, *batch)
        half = "float16 ends at 65504, which --dtype bfloat16 does not; or " if self.config.dtype == "float16" else ""
        kept = self.keeper.newest() if self.keeper else None
        again = f"; to go on from the last checkpoint: --init {kept}, with that" if kept else ""
        return (
            f"{what} at step {step} (largest gradient: {name}, {value:g}); {half}a lower --learning-rate "
            f"(it was {self.config.learning_rate:g}) or a longer --warmup usually helps{again}"
        )


def make_step(
    model: GPT, optimizer: optim.Optimizer, config: TrainConfig, group: mx.distributed.Group | None
) -> TrainStep:
    """The compiled step of some settings."""
    return make_train_step(
        model,
        optimizer,
        config.grad_clip,
        config.batch_size,
        accumulate=config.accumulate,
        dtype=config.dtype,
        recompute=config.recompute,
        group=group,
    )
