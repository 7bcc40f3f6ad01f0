"""The MLP: the same two-layer network applied to each token by itself."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.activations import GELU_NEW, OTHERS
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.dropout import Dropout
from mlx_gpt.model.ops import gelu_new

ACTIVATION = dict.fromkeys(GELU_NEW, gelu_new) | OTHERS


class MLP(nn.Module):
    """Up-project (``c_fc``: C -> ``inner_dim``, usually 4C), activation, down-project (``c_proj``)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner_dim)
        self.c_proj = nn.Linear(config.inner_dim, config.n_embd)
        self.activation = ACTIVATION[config.activation_function]
        self.dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., C) -> (..., C)."""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))
