"""One block: attend, then think, each time adding to the residual stream and never overwriting it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.mlp import MLP
from mlx_gpt.model.norm import LayerNorm


class Block(nn.Module):
    """GPT-2's pre-LN block: the norms stand before attention and MLP, the residual stream itself stays untouched."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = MultiHeadAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x
