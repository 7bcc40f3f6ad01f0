"""The operations with more than one backend. On a Mac each is the MLX call in its last line.

On Linux without a GPU they use ``linux_cpu``, which replaces what is slow in MLX's CPU backend.
"""

from __future__ import annotations

import sys
from math import pi, sqrt

import mlx.core as mx
import mlx.nn as nn

if sys.platform.startswith("linux"):
    from mlx_gpt.linux_cpu import kernels


def custom_kernels(dtype: mx.Dtype) -> bool:
    """Return whether arrays of this type use ``linux_cpu.kernels`` instead of MLX's own operations."""
    return sys.platform.startswith("linux") and kernels.supports(dtype)


def saves_pattern(T: int, dtype: mx.Dtype) -> bool:
    """Return whether attention over T tokens saves its (T, T) pattern for the backward pass."""
    return not custom_kernels(dtype) or kernels.saves_pattern(T)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str) -> mx.array:
    """Return ``softmax(q @ k.T * scale) @ v`` for the keys that ``mask`` allows: (B, H, T, D), (B, H, S, D) twice.

    ``mask`` is "causal" or a boolean (T, S) or (B, 1, T, S), True where a query may attend. Returns (B, H, T, D).
    """
    if custom_kernels(q.dtype):
        return kernels.attention(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (Ba et al. 2016): (..., C) -> (..., C)."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training and custom_kernels(x.dtype):
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().__call__(x)


def gelu_new(x: mx.array) -> mx.array:
    """Return GPT-2's GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, section 2).

    Uses 0.5 (1 + tanh(z)) == sigmoid(2z), and x*x because x**2 compiles to powf.
    """
    # The checkpoint saves x alone for the backward pass: each pass is one kernel.
    return kernels.gelu_new(x) if custom_kernels(x.dtype) else mx.checkpoint(_gelu_new)(x)


def _gelu_new(x: mx.array) -> mx.array:
    return x * mx.sigmoid(2 * sqrt(2 / pi) * x * (1 + 0.044715 * (x * x)))


def exp(x: mx.array) -> mx.array:
    """Return e^x, elementwise, for x <= 0."""
    return kernels.exp(x) if custom_kernels(x.dtype) else mx.exp(x)
