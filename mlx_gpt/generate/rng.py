"""Random keys: one for each row and each position in it, so that a row's draws do not depend on its batch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def row_keys(seed: int | None, n_rows: int) -> mx.array:
    """Return the keys of n rows, (n, 2), uint32; without a seed they come from MLX's random state.

    Row i has the same key however many rows there are.
    """
    entropy: Any = mx.random.randint(0, 2**31 - 1, (2,)).tolist() if seed is None else seed
    return mx.array(np.array([row_key(entropy, row) for row in range(n_rows)]))


def row_key(seed: Any, row: int) -> np.ndarray:
    """Return the key of one row, (2,), uint32."""
    return np.random.SeedSequence(seed, spawn_key=(row,)).generate_state(2)


def key_at(keys: mx.array, position: int | np.ndarray, use: int = 0) -> mx.array:
    """Return the keys for the token at ``position``, one for all rows or (B,); (B, 2). ``use`` separates several draws.

    Threefry, MLX's generator, gives unrelated numbers for keys that differ in one bit (Salmon et al. 2011).
    """
    return keys ^ mx.array(np.stack(np.broadcast_arrays(use, position), axis=-1).astype(np.uint32))
