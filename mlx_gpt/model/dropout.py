"""Dropout whose mask can be drawn twice."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Dropout(nn.Module):
    """Sets a share ``p`` of the elements to zero while training and scales the rest up (Srivastava et al. 2014).

    With a ``key`` the mask is the same at each call, as a block needs that is computed a second time on the way back;
    with none it comes from MLX's random state.
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
