"""Where chance comes from: a key for each row and each place in it, so that a row draws alike alone and in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


def row_keys(seed: int | None, n_rows: int) -> mx.array:
    """The keys of n rows, (n, 2), the same for the same seed; without one they come from MLX's random state.

    Row i has the same key however many there are.
    """
    entropy: Any = mx.random.randint(0, 2**31 - 1, (2,)).tolist() if seed is None else seed
    return mx.array(np.stack([row_key(entropy, row) for row in range(n_rows)]))


def row_key(seed: Any, row: int) -> np.ndarray:
    """The key of one row, (2,), uint32."""
    return np.random.SeedSequence(seed, spawn_key=(row,)).generate_state(2)


def key_at(keys: mx.array, place: int, use: int = 0) -> mx.array:
    """The keys with which the rows draw their token at ``place``, (B, 2); ``use`` tells apart several draws there.

    MLX's generator makes unrelated numbers of keys that differ in one bit (threefry, Salmon et al. 2011).
    """
    return keys ^ mx.array([use, place], dtype=mx.uint32)


def keys_at(keys: mx.array, places: Sequence[int]) -> mx.array:
    """The same where each row is at a place of its own."""
    return keys ^ mx.array([[0, place] for place in places], dtype=mx.uint32)
