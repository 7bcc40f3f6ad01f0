"""Layer norm: every token's vector to mean 0 and variance 1, then scaled and moved by learned weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.linux_cpu import kernels as cpu


class LayerNorm(nn.LayerNorm):
    """MLX's (Ba et al. 2016), on a CPU with less rounding. (..., T, C) -> (..., T, C).

    But in training memory counts more, and for one token, in decoding, time: MLX has one operation where that takes
    several.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self.training or x.ndim == 2 or not cpu.suits(x.dtype):
            return super().__call__(x)
        return cpu.layer_norm(x, self.weight, self.bias, self.eps)
