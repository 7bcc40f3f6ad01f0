"""A loss, a gradient and a step of one's own, as arguments of ``examine``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from .planted import Base, Given

Loss = Callable[[mx.array, mx.array], mx.array]  # logits (B, T, V), targets (B, T)
Tree = dict[str, Any]
RATE = 3e-3


def cross_entropy(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="mean")


def costs(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="none")


def adam(rate: Any = RATE, **settings: Any) -> Callable[[], Any]:
    return lambda: optim.AdamW(rate, **{"weight_decay": 0.0, "bias_correction": True, **settings})


def sgd(rate: float = RATE, **settings: Any) -> Callable[[], Any]:
    return lambda: optim.SGD(rate, **settings)


def trained_with(
    base: Base,
    loss: Loss = cross_entropy,
    optimizer: Callable[[], Any] | None = None,
    *,
    batch: Callable[[Any, Any], tuple[Any, Any]] = lambda x, y: (x, y),
    change: Callable[[Tree], Tree] = lambda grads: grads,
    after: Callable[[Any], None] = lambda model: None,
    gradients: Callable[[Any, mx.array, mx.array], tuple[mx.array, Tree]] | None = None,
    dropout: bool = True,
    **given: Any,
) -> Given:
    """Return the arguments of examine for a loss and a step of one's own.

    It trains on ``batch(x, y)``, applies ``change`` to the gradients (a flat dict), and ends with ``after(model)``.
    """
    model = base.model
    value_and_grad = nn.value_and_grad(model, lambda x, y: loss(model(x), y))

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        return dict(tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1]))

    def new_step() -> Callable[[Any, Any], float]:
        its = (optimizer or adam())()

        def step(x: Any, y: Any) -> float:
            x, y = batch(x, y)
            model.train(dropout)
            if gradients is None:
                value, grads = value_and_grad(mx.array(x), mx.array(y))
            else:
                value, grads = gradients(value_and_grad, mx.array(x), mx.array(y))
            its.update(model, tree_unflatten(list(change(dict(tree_flatten(grads))).items())))
            after(model)
            mx.eval(model.parameters(), its.state, value)
            model.train(False)
            return float(value.item())

        return step

    return base.arguments(
        loss=lambda x, y: loss(model(mx.array(x)), mx.array(y)).item(),
        gradient=gradient,
        new_step=new_step,
        step=new_step(),
        parameters=lambda: {name: mx.array(value) for name, value in tree_flatten(model.parameters())},
        load_parameters=lambda values: model.update(tree_unflatten(list(values.items()))),
        **{"learning_rate": RATE, **given},
    )


def step_alone(given: Given) -> Given:
    return {name: value for name, value in given.items() if name != "new_step"}
