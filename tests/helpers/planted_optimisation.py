"""Faults of loss, gradient and step to plant in a small GPT, and healthy ways to train that must have no fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .planted import Base, Given, Planted

Loss = Callable[[mx.array, mx.array], mx.array]  # logits (B, T, V), targets (B, T)
Tree = dict[str, Any]
RATE = 3e-3


def cross_entropy(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="mean")


def costs(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="none")


def adam(rate: Any = RATE, **settings: Any) -> Callable[[], Any]:
    return lambda: optim.AdamW(rate, **{"weight_decay": 0.0, "bias_correction": True, **settings})


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
        learning_rate=RATE,
        parameters=lambda: {name: mx.array(value) for name, value in tree_flatten(model.parameters())},
        load_parameters=lambda values: model.update(tree_unflatten(list(values.items()))),
        **given,
    )


# Losses -------------------------------------------------------------------------------------------------------------


def squared_error(logits: mx.array, y: mx.array) -> mx.array:
    return mx.square(mx.softmax(logits, axis=-1) - (mx.arange(logits.shape[-1]) == y[..., None])).sum(-1).mean()


def smoothed(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, label_smoothing=0.1, reduction="mean")


def masked_over_all(logits: mx.array, y: mx.array) -> mx.array:
    return (costs(logits, mx.maximum(y, 0)) * (y >= 0)).mean()


def masked(logits: mx.array, y: mx.array) -> mx.array:
    return (costs(logits, mx.maximum(y, 0)) * (y >= 0)).sum() / (y >= 0).sum()


def with_z_loss(logits: mx.array, y: mx.array) -> mx.array:
    return cross_entropy(logits, y) + 1e-3 * mx.square(mx.logsumexp(logits, axis=-1)).mean()


def padded_batches(base: Base) -> Callable[[], Any]:
    def batches() -> Any:
        for x, y in base.batches():
            y = y.copy()
            y[:, : y.shape[1] // 3] = -1
            yield x, y

    return batches


LOSSES: dict[str, tuple[str, Loss]] = {
    "squared error": ("loss-not-cross-entropy", squared_error),
    "softmax twice": ("loss-not-cross-entropy", lambda l, y: cross_entropy(mx.softmax(l, axis=-1), y)),
    "label smoothing": ("loss-not-cross-entropy", smoothed),
    "softmax over time": ("loss-not-cross-entropy", lambda l, y: -take(l - mx.logsumexp(l, axis=1, keepdims=True), y)),
    "softmax over the batch": (
        "loss-not-cross-entropy",
        lambda l, y: -take(l - mx.logsumexp(l, axis=0, keepdims=True), y),
    ),
    "targets transposed": (
        "loss-not-cross-entropy",
        lambda l, y: cross_entropy(l.reshape(-1, l.shape[-1]), y.T.reshape(-1)),
    ),
    "focal": ("loss-not-cross-entropy", lambda l, y: (mx.square(1 - mx.exp(-costs(l, y))) * costs(l, y)).mean()),
    "probability": ("loss-not-cross-entropy", lambda l, y: -take(mx.softmax(l, axis=-1), y)),
    "logit": ("loss-not-cross-entropy", lambda l, y: -take(l, y)),
    "a sum": ("loss-not-the-mean", lambda l, y: costs(l, y).sum()),
    "a sum over time": ("loss-not-the-mean", lambda l, y: costs(l, y).sum(1).mean()),
    "a sum over rows": ("loss-not-the-mean", lambda l, y: costs(l, y).mean(1).sum()),
    "the last position": ("loss-not-the-mean", lambda l, y: costs(l, y)[:, -1].mean()),
    "the first row": ("loss-not-the-mean", lambda l, y: costs(l, y)[0].mean()),
    "mean over the vocabulary": ("loss-not-the-mean", lambda l, y: costs(l, y).mean() / l.shape[-1]),
}


def take(logprobs: mx.array, y: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, y[..., None], axis=-1).mean()


FAULTS: dict[str, Planted] = {
    name: Planted(code, lambda base, loss=loss: trained_with(base, loss)) for name, (code, loss) in LOSSES.items()
}
FAULTS["mask counted"] = Planted(
    "loss-not-the-mean", lambda base: trained_with(base, masked_over_all, batches=padded_batches(base))
)
HEALTHY: dict[str, Callable[[Base], Given]] = {
    "plain": lambda base: trained_with(base),
    "z-loss": lambda base: trained_with(base, with_z_loss),
    "bits": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) / np.log(2)),
    "perplexity": lambda base: (
        trained_with(base, loss=cross_entropy)
        | {"loss": lambda x, y: mx.exp(cross_entropy(base.model(mx.array(x)), mx.array(y))).item()}
    ),
    "masked": lambda base: trained_with(base, masked, batches=padded_batches(base)),
    "a quarter": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) / 4),
    "ignores id 0": lambda base: trained_with(base, lambda l, y: (costs(l, y) * (y != 0)).sum() / (y != 0).sum()),
    "without the last": lambda base: trained_with(base, lambda l, y: cross_entropy(l[:, :-1], y[:, :-1])),
    "shifts itself": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l[:, :-1], y[:, 1:]), batches=lambda: ((x, x) for x, _ in base.batches())
    ),
    "in bfloat16": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l.astype(mx.bfloat16), y).astype(mx.float32)
    ),
}
