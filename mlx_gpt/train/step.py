"""One training step and one evaluation step, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.gradient import accumulated, compiled, configured_lanes, make_loss_and_gradient
from mlx_gpt.train.loss import next_token_losses

TrainStep = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
EvalStep = Callable[[mx.array, mx.array, mx.array], mx.array]


def make_train_step(
    model: GPT, optimizer: optim.Optimizer, config: TrainConfig, group: mx.distributed.Group | None = None
) -> tuple[TrainStep, list[Any]]:
    """Return the compiled step ``step(x, y) -> (loss, gradient norm before clipping)`` and the state it updates.

    x, y: ids (accumulate * B, T), always of the same shape, since another one is traced again. ``state`` holds weights,
    optimizer state and random state; evaluate it after each step, and load a saved optimizer state before this call.
    The model is put into training mode, which the trace keeps. If loss or gradient are not finite, the gradient is
    replaced by 0. In a ``group`` loss and gradient are averaged over its processes.
    """
    model.train()
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_gradient = make_loss_and_gradient(model, config)

    def update(loss: mx.array, gradient: Any) -> tuple[mx.array, mx.array]:
        if group:
            loss, gradient = nn.average_gradients((loss, gradient), group)
        gradient, norm = optim.clip_grad_norm(gradient, config.grad_clip)
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        gradient = tree_map(lambda g: mx.where(finite, g, 0), gradient)
        optimizer.update(model, gradient)
        return loss, norm

    lanes = configured_lanes(1 if config.recompute else config.batch_size)  # every lane has a gradient in memory
    if config.accumulate == lanes == 1:

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
            return update(*loss_and_gradient(x, y))

    else:
        loss_and_gradient = compiled(loss_and_gradient, model, lanes)
        if config.accumulate > 1:
            loss_and_gradient = accumulated(loss_and_gradient, config.accumulate)
        compiled_update = mx.compile(update, inputs=state, outputs=state)

        def step(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
            return compiled_update(*loss_and_gradient(x, y))

    mx.eval(state)
    return step, state


def make_eval_step(model: GPT) -> EvalStep:
    """Return the compiled ``step(x, y, counts)``: the sum in nats of the losses where ``counts``; each (B, T)."""

    @partial(mx.compile, inputs=[model.state])
    def step(x: mx.array, y: mx.array, counts: mx.array) -> mx.array:
        return (next_token_losses(model(x), y) * counts).sum()

    return step
