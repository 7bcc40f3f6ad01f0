"""One training step and one evaluation, compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.loss import mean_loss, next_token_losses

TrainStep = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
EvalStep = Callable[[mx.array, mx.array, mx.array], mx.array]


def make_train_step(model: GPT, optimizer: optim.Optimizer, clip: float, batch_size: int) -> tuple[TrainStep, list]:
    """The compiled step ``(x, y) -> (loss, gradient norm before clipping)``, and the state it changes.

    x, y: ids (B, T), always of the same shape (a new shape is a new trace). Weights, optimizer state and random
    state go in and come out, so that nothing is frozen into the trace; evaluate them after each step. The step
    is traced in train mode; put the model back into it after an evaluation.
    """
    model.train()
    lanes = batch_lanes(batch_size)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state)
    loss_and_gradient = nn.value_and_grad(model, lambda x, y: mean_loss(model(x), y))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        loss, gradient = _side_by_side(loss_and_gradient, lanes, x, y)
        gradient, norm = optim.clip_grad_norm(gradient, clip)
        optimizer.update(model, gradient)
        return loss, norm

    return step, state


def make_eval_step(model: GPT) -> EvalStep:
    """The compiled evaluation ``(x, y, counts) -> sum of the counted losses`` in nats; x, y, counts: (B, T)."""

    @partial(mx.compile, inputs=[model.state])
    def evaluate(x: mx.array, y: mx.array, counts: mx.array) -> mx.array:
        return (next_token_losses(model(x), y) * counts).sum()

    return evaluate


def batch_lanes(batch_size: int) -> list[mx.Stream]:
    """Streams over which the rows of a batch are spread.

    MLX's CPU backend runs each stream on one thread, so on a CPU every core gets an equal share of the rows; a GPU
    takes the whole batch at once. MLX orders a graph breadth first, but only up to a width that is less than a step of
    this model: it would run the shares one after the other. So the width is raised, unless the environment sets it or
    something has been evaluated before, when MLX has read it already.
    """
    device = mx.default_device()
    lanes = 1
    if device == mx.Device(mx.cpu):
        lanes = max(n for n in range(1, _cores() + 1) if batch_size % n == 0)
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100")
    return [mx.default_stream(device)] + [mx.new_stream(device) for _ in range(lanes - 1)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(loss_and_gradient: Callable, lanes: list[mx.Stream], x: mx.array, y: mx.array) -> tuple:
    # The mean over equal shares is the mean over the batch, for the loss and for the gradient.
    results = []
    for stream, rows, targets in zip(lanes, mx.split(x, len(lanes)), mx.split(y, len(lanes)), strict=True):
        with mx.stream(stream):
            results.append(loss_and_gradient(rows, targets))
    if len(results) == 1:
        return results[0]
    return tree_map(lambda *parts: sum(parts[1:], parts[0]) * (1 / len(parts)), *results)
