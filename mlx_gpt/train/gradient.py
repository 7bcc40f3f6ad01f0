"""Loss and gradient of a batch, in float32 or half precision, in one part or several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.device import n_lanes
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loss import batch_loss, mean_loss
from mlx_gpt.train.recompute import hidden_recomputed

if sys.platform.startswith("linux"):
    from mlx_gpt.linux_cpu.lanes import configure, over_lanes

LossAndGradient = Callable[[mx.array, mx.array], tuple[mx.array, Any]]  # x, y (B, T) -> loss (), gradient


def make_loss_and_gradient(model: GPT, config: TrainConfig) -> LossAndGradient:
    """Return the function from x, y (B, T) to the mean loss in nats per token and its gradient in float32.

    The model computes in ``config.dtype``, with its float32 weights cast inside the loss.
    """
    dtype = getattr(mx, config.dtype)
    hidden = partial(hidden_recomputed, model) if config.recompute else model.hidden

    def scale(y: mx.array) -> int:
        # Gradients below 6e-8 underflow in float16: it takes the sum of the losses instead of their mean.
        return y.size if dtype == mx.float16 else 1

    def loss(x: mx.array, y: mx.array) -> mx.array:
        if dtype != mx.float32:
            model.update(tree_map(lambda weight: weight.astype(dtype), model.trainable_parameters()))
        return batch_loss(model, hidden(x), y) * scale(y)

    scaled_loss_and_gradient = nn.value_and_grad(model, loss)

    def loss_and_gradient(x: mx.array, y: mx.array) -> tuple[mx.array, Any]:
        weights = model.trainable_parameters()
        result = scaled_loss_and_gradient(x, y)
        model.update(weights)  # value_and_grad leaves its own arrays in the model
        return _scaled(result, 1 / scale(y))

    return loss_and_gradient


def compiled(loss_and_gradient: LossAndGradient, model: GPT, lanes: int) -> LossAndGradient:
    """Return ``loss_and_gradient`` compiled by itself, with the rows of a batch in ``lanes`` shares side by side."""
    compile_share = partial(mx.compile, inputs=[model.state, mx.random.state], outputs=[mx.random.state])
    return over_lanes(loss_and_gradient, compile_share, lanes) if lanes > 1 else compile_share(loss_and_gradient)


def configured_lanes(batch_size: int) -> int:
    """Return ``n_lanes``, with MLX's CPU backend on Linux set up for it."""
    lanes = n_lanes(batch_size)
    if sys.platform.startswith("linux"):
        configure(lanes)
    return lanes


def accumulated(loss_and_gradient: LossAndGradient, n: int) -> LossAndGradient:
    """Return the mean of loss and gradient over ``n`` equal parts of a batch, with one part in memory at a time."""
    add = mx.compile(lambda total, part: tree_map(mx.add, total, part))

    def mean(x: mx.array, y: mx.array) -> tuple[mx.array, Any]:
        total: Any = None
        for part in zip(mx.split(x, n), mx.split(y, n), strict=True):
            result = loss_and_gradient(*part)
            total = result if total is None else add(total, result)
            mx.eval(total, mx.random.state)  # otherwise the graphs of all parts are kept
        return _scaled(total, 1 / n)

    return mean


def largest_gradient(model: GPT, x: mx.array, y: mx.array) -> tuple[str, float]:
    """Return the name of the weight with the largest gradient element, in float32, and the size of that element.

    NaN counts as largest; of several, the weight nearest to the loss is returned, where the NaN came from.
    """
    _, gradient = nn.value_and_grad(model, lambda x, y: mean_loss(model(x), y))(x, y)
    gradients: dict[str, mx.array] = dict(tree_flatten(gradient))
    sizes = {name: float(np.abs(np.array(part)).max()) for name, part in gradients.items()}
    name = max(reversed(sizes), key=lambda name: np.nan_to_num(sizes[name], nan=np.inf))
    return name, sizes[name]


def _scaled(tree: Any, factor: float) -> Any:
    return tree if factor == 1 else tree_map(lambda part: part * factor, tree)
