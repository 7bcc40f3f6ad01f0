"""Losses that are not the mean cross-entropy, and healthy ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .optimisation_training import Loss, costs, cross_entropy, trained_with
from .planted import Base, Planted


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


def ignoring(token: int) -> Loss:
    return lambda logits, y: (costs(logits, y) * (y != token)).sum() / (y != token).sum()


def padded_batches(base: Base) -> Callable[[], Any]:
    def batches() -> Any:
        for x, y in base.batches():
            y = y.copy()
            y[:, : y.shape[1] // 3] = -1
            yield x, y

    return batches


def take(logprobs: mx.array, y: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, y[..., None], axis=-1).mean()


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
    "bits": ("loss-not-cross-entropy", lambda l, y: cross_entropy(l, y) / np.log(2)),
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
FAULTS: dict[str, Planted] = {
    name: Planted(code, lambda base, loss=loss: trained_with(base, loss)) for name, (code, loss) in LOSSES.items()
}


def space_ignored_in_training(base: Base) -> dict[str, Any]:
    """Return a loss that ignores the space, of a model that was trained so and finds it improbable."""
    space = base.encode(" ")[0]

    def draw(base: Base, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((x, np.where(y == space, -1, y)) for x, y in replace(base, draw=None).batches(seed))

    return trained_with(replace(base, draw=draw), ignoring(space), batches=base.batches, val_loss=None)


def transposed_without_context(base: Base) -> dict[str, Any]:
    """Return the arguments for transposed targets where the predictions hardly depend on the context."""
    V = base.config.vocab_size

    def logits(ids: Any) -> mx.array:
        return mx.array(base.forward(ids)) / 100 + 4 * mx.cos(mx.arange(V))

    given = {
        "forward": lambda ids: np.array(logits(ids)),
        "loss": lambda x, y: LOSSES["targets transposed"][1](logits(x), mx.array(y)).item(),
    }
    return {
        "vocab_size": V,
        "n_positions": base.config.n_positions,
        "parameters": base.arguments()["parameters"],
        **given,
    }


# untrained, the context moves a loss of 8 nats by 5e-4 only, about its error
FAULTS["targets transposed, hardly any context"] = Planted(
    "loss-not-cross-entropy", transposed_without_context, states=(True,)
)
FAULTS["the space ignored"] = Planted(
    "loss-not-the-mean", lambda base: trained_with(base, ignoring(base.encode(" ")[0]))
)
FAULTS["the space ignored, and improbable"] = Planted("loss-not-the-mean", space_ignored_in_training, states=(True,))
FAULTS["mask counted"] = Planted(
    "loss-not-the-mean", lambda base: trained_with(base, masked_over_all, batches=padded_batches(base))
)
