"""What the tests of training share: a small model, a batch for it, and its weights in NumPy."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT

SMALL = GPTConfig(vocab_size=257, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def new_small(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(config)


def batch(seed: int = 0, B: int = 4) -> tuple[mx.array, mx.array]:
    rows = np.random.default_rng(seed).integers(0, SMALL.vocab_size, (B, SMALL.n_positions + 1), np.int32)
    return mx.array(rows[:, :-1]), mx.array(rows[:, 1:])


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
