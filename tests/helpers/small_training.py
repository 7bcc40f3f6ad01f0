"""Helpers of the training tests: a small model, a batch for it, its weights in NumPy, a distance, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def distance(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def peak(run: Callable[[], Any]) -> int:
    """Peak memory of a function in bytes, above the memory in use before."""
    limit = mx.set_memory_limit(1)  # so that MLX waits for freed memory
    try:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(run())
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)
