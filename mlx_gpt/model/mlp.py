"""The MLP: after attention has moved information between tokens, each token thinks about it alone."""

from __future__ import annotations

from math import pi, sqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.linux_cpu import kernels as cpu
from mlx_gpt.model.dropout import Dropout


def gelu_new(x: mx.array) -> mx.array:
    """GPT-2's GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, section 2).

    Written with the sigmoid, since 0.5 (1 + tanh(z)) == sigmoid(2z); x*x*x because x**3 would call powf.
    """
    if cpu.suits(x.dtype) and x.size > cpu.FEW:
        return cpu.gelu_new(x)
    return x * mx.sigmoid((2 * sqrt(2 / pi)) * (x + 0.044715 * x * x * x))


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x times the normal distribution function of x, as in Cerebras-GPT."""
    return x * (0.5 + 0.5 * mx.erf(x * sqrt(0.5)))


ACTIVATION = {"gelu_new": gelu_new, "gelu": gelu}


class MLP(nn.Module):
    """Widen (``c_fc``: C -> 4C), bend (GELU), narrow (``c_proj``: 4C -> C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner_dim)
        self.c_proj = nn.Linear(config.inner_dim, config.n_embd)
        self.activation = ACTIVATION[config.activation_function]
        self.dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))
