"""A small GPT-2 whose norms and biases are random too, and texts for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT

V, P, C, L, H = 37, 24, 32, 3, 4
B, T, D = 2, 9, C // H


def random_model(seed: int = 0, **fields: Any) -> GPT:
    """Return a model in which every weight matters."""
    mx.random.seed(seed)
    settings = {"vocab_size": V, "n_positions": P, "n_embd": C, "n_layer": L, "n_head": H, "initializer_range": 0.2}
    model = GPT(GPTConfig(**(settings | fields)))
    model.update(tree_map(lambda weight: weight + 0.1 * mx.random.normal(weight.shape), model.parameters()))
    return model


def random_ids(seed: int = 0, shape: tuple[int, ...] = (B, T)) -> mx.array:
    return mx.random.randint(0, V, shape, key=mx.random.key(seed))


def largest_difference(a: mx.array, b: mx.array) -> float:
    """Return the largest difference of two arrays of one shape."""
    assert a.shape == b.shape
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()
