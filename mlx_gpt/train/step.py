"""One training step and one evaluation, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.device import cores
from mlx_gpt.linux_cpu.openblas import set_threads
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.loss import chunked_mean_loss, in_chunks, mean_loss, next_token_losses
from mlx_gpt.train.machine import lanes, set_breadth
from mlx_gpt.train.recompute import hidden_recomputed

EvalStep = Callable[[mx.array, mx.array, mx.array], mx.array]


class TrainStep:
    """One optimizer step, compiled: ``step(x, y) -> (loss, gradient norm before clipping)``.

    x, y: ids (B, T), or (accumulate, B, T), always of the same shape (a new shape is a new trace).
    ``state`` is what a step changes: weights, optimizer state and random state; evaluate it
    after each step. All of it goes into the trace and comes out, so that nothing is frozen: but an optimizer's state is
    loaded before the step is made.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: optim.Optimizer,
        clip: float,
        batch_size: int,
        accumulate: int,
        dtype: mx.Dtype,
        recompute: bool,
        group: mx.distributed.Group | None,
    ):
        model.train()
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.accumulate, self.dtype, self.recompute, self.group = accumulate, dtype, recompute, group
        self.lanes = batch_lanes(1 if recompute else batch_size)  # each lane has gradients of its own in memory
        set_threads(1 if len(self.lanes) > 1 else cores())  # with lanes, each core has its own
        optimizer.init(model.trainable_parameters())
        self.state = [model.state, optimizer.state, mx.random.state]
        mx.eval(self.state)
        self._scaled_loss_and_gradient = nn.value_and_grad(model, self._scaled_loss)
        compiled = partial(mx.compile, inputs=self.state, outputs=self.state)
        self._whole = compiled(lambda x, y: self._apply(*self._loss_and_gradient(x, y)))
        self._shares = [self._compiled_share(stream) for stream in self.lanes]
        self._add = mx.compile(lambda *parts: _sum(parts))
        n = accumulate * len(self.lanes)  # the mean over equal shares is the mean over all
        self._finish = compiled(lambda *parts: self._apply(*_scaled(_sum(parts), 1 / n)))

    def __call__(self, x: np.ndarray | mx.array, y: np.ndarray | mx.array) -> tuple[mx.array, mx.array]:
        x, y = mx.array(x), mx.array(y)
        if self.accumulate == len(self.lanes) == 1:
            return self._whole(x, y)
        parts: list[Any] = []
        for rows, targets in [(x, y)] if self.accumulate == 1 else zip(x, y, strict=True):
            shares = zip(self._shares, mx.split(rows, len(self.lanes)), mx.split(targets, len(self.lanes)), strict=True)
            parts += [share(*its) for share, *its in shares]
            if self.accumulate > 1:
                parts = [self._add(*parts)]
                mx.eval(parts, self.state)  # or the graphs of all of them pile up
        return self._finish(*parts)

    def _compiled_share(self, stream: mx.Stream) -> Callable[[mx.array, mx.array], Any]:
        """Loss and gradient of some rows in a lane, compiled by itself.

        In one graph MLX takes what is equal in two lanes, such as a constant spread over a shape, for one and the same,
        and then can fuse it with the operations of one of them only: the others wait for it, and take it in strides.
        """

        @partial(mx.compile, inputs=[self.model.state, mx.random.state], outputs=[mx.random.state])
        def share(rows: mx.array, targets: mx.array) -> tuple[mx.array, Any]:
            with mx.stream(stream):
                return self._loss_and_gradient(rows, targets)

        return share

    def _loss_and_gradient(self, x: mx.array, y: mx.array) -> tuple[mx.array, Any]:
        masters = self.model.trainable_parameters()
        result = self._scaled_loss_and_gradient(x, y)
        self.model.update(masters)  # the loss has left its own copies in the model
        return _scaled(result, 1 / self._scale(y))

    def _scaled_loss(self, x: mx.array, y: mx.array) -> mx.array:
        model = self.model
        if self.dtype != mx.float32:  # the cast is part of the loss, so its gradient comes back in float32
            model.update(tree_map(lambda weight: weight.astype(self.dtype), model.trainable_parameters()))
        hidden = hidden_recomputed(model, x) if self.recompute else model.hidden(x)
        if in_chunks(y.size * model.config.vocab_size, hidden.dtype):
            loss = chunked_mean_loss(hidden, model.head_weight, y)
        else:
            loss = mean_loss(model.logits(hidden), y)
        return loss * self._scale(y)

    def _scale(self, y: mx.array) -> int:
        # float16 has no gradients below 6e-8: the sum over all targets, not the mean, goes through it.
        return y.size if self.dtype == mx.float16 else 1

    def _apply(self, loss: mx.array, gradient: Any) -> tuple[mx.array, mx.array]:
        if self.group is not None:
            loss = mx.distributed.all_sum(loss, group=self.group) / self.group.size()
            gradient = nn.average_gradients(gradient, group=self.group)
        gradient, norm = optim.clip_grad_norm(gradient, self.clip)
        sound = mx.isfinite(loss) & mx.isfinite(norm)  # else the weights would be lost, and with them the reason
        gradient = tree_map(lambda part: mx.where(sound, part, 0), gradient)
        self.optimizer.update(self.model, gradient)
        return loss, norm


def make_train_step(
    model: GPT,
    optimizer: optim.Optimizer,
    clip: float,
    batch_size: int,
    *,
    accumulate: int = 1,
    dtype: str = "float32",
    recompute: bool = False,
    group: mx.distributed.Group | None = None,
) -> TrainStep:
    """The compiled step of a model in train mode; put it back into that mode after an evaluation.

    The gradient of ``accumulate`` batches is averaged before it is clipped and applied, and over the processes of
    ``group``. ``dtype`` is what is computed in: float32, bfloat16 or float16; the weights and their gradients stay
    float32. ``recompute`` computes what is inside a block again on the way back, instead of keeping it.
    """
    return TrainStep(model, optimizer, clip, batch_size, accumulate, getattr(mx, dtype), recompute, group)


def _sum(trees: Sequence[Any]) -> Any:
    return tree_map(lambda *parts: sum(parts[1:], parts[0]), *trees)


def _scaled(tree: Any, factor: float) -> Any:
    return tree if factor == 1 else tree_map(lambda part: part * factor, tree)


def largest_gradient(model: GPT, x: np.ndarray | mx.array, y: np.ndarray | mx.array) -> tuple[str, float]:
    """The weight whose gradient has the largest element, and that element's size, computed in float32.

    One that is no number is largest; of several the one nearest to the loss, since the others have it from there.
    """
    T = x.shape[-1]
    _, gradient = nn.value_and_grad(model, lambda x, y: mean_loss(model(x), y))(
        mx.array(x).reshape(-1, T), mx.array(y).reshape(-1, T)
    )
    gradients: dict[str, mx.array] = dict(tree_flatten(gradient))
    sizes = {name: float(np.abs(np.array(part)).max()) for name, part in gradients.items()}
    name = max(reversed(sizes), key=lambda name: np.nan_to_num(sizes[name], nan=np.inf))
    return name, sizes[name]


def make_eval_step(model: GPT) -> EvalStep:
    """The compiled evaluation ``(x, y, counts) -> sum of the counted losses`` in nats; x, y, counts: (B, T)."""

    @partial(mx.compile, inputs=[model.state])
    def evaluate(x: mx.array, y: mx.array, counts: mx.array) -> mx.array:
        return (next_token_losses(model(x), y) * counts).sum()

    return evaluate


def batch_lanes(batch_size: int) -> list[mx.Stream]:
    """Streams over which the rows of a batch are spread.

    MLX's CPU backend runs each stream on one thread, so on a CPU every core gets an equal share of the rows; a GPU
    takes the whole batch at once.
    """
    n = lanes(batch_size)
    set_breadth(n > 1)
    device = mx.default_device()
    return [mx.default_stream(device)] + [mx.new_stream(device) for _ in range(n - 1)]
