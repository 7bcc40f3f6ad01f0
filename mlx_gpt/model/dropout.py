"""Dropout with an optional key, so that a mask can be drawn again."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Dropout(nn.Module):
    """Zero a share ``p`` of the elements in training and scale up the rest (Srivastava et al. 2014).

    A ``key`` gives the same mask at each call, which recomputation in the backward pass needs. Without a key the mask
    is drawn from MLX's random state.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """(...) -> (...), the same shape."""
        if self.p == 0 or not self.training:
            return x
        kept = mx.random.bernoulli(1 - self.p, x.shape, key=self.key)
        return x * kept * (1 / (1 - self.p))
