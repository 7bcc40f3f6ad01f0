"""Gradients that differ from those of the loss."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .optimisation_training import cross_entropy, trained_with
from .planted import Base, Given, Planted


def gradient_of(base: Base, *faults: str, stop: str = "") -> Given:
    """Return the gradient of the same weights with faults of PlainGPT's, or with a part of the attention cut off."""
    given, model = trained_with(base), base.model

    def loss(x: mx.array, y: mx.array) -> mx.array:
        return cross_entropy(model(x), y)

    value_and_grad = nn.value_and_grad(model, loss)

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        softmax, layers = mx.softmax, [block.attention for block in model.blocks]
        kept = [layer.faults for layer in layers]
        mx.softmax = (lambda a, **settings: mx.stop_gradient(softmax(a, **settings))) if stop else softmax
        try:
            for layer in layers:
                layer.faults = {*layer.faults, *faults}
            grads = dict(tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1]))
        finally:
            mx.softmax = softmax
            for layer, before in zip(layers, kept, strict=True):
                layer.faults = before
        return grads

    return {**given, "gradient": gradient}


def flattened(base: Base) -> Given:
    """Return a gradient of which one matrix is transposed."""
    given = trained_with(base)

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        grads = given["gradient"](x, y)
        name = "blocks.0.attention.out.weight"
        return {**grads, name: grads[name].T}

    return {**given, "gradient": gradient}


FAULTS: dict[str, Planted] = {
    "no mask in the gradient": Planted("future-leak-in-gradient", lambda base: gradient_of(base, "no-mask")),
    "one token of the future in the gradient": Planted(
        "future-leak-in-gradient", lambda base: gradient_of(base, "mask-shifted")
    ),
    "attention's pattern cut off": Planted("future-leak-in-gradient", lambda base: gradient_of(base, stop="pattern")),
    "a matrix's gradient transposed": Planted("future-leak-in-gradient", flattened),
}
