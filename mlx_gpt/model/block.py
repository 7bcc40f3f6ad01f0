"""One block: attention, then the MLP, each adding to the residual stream."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.mlp import MLP
from mlx_gpt.model.ops import LayerNorm


class Block(nn.Module):
    """GPT-2's pre-norm block: norms on the inputs of attention and MLP only (Radford et al. 2019, section 2.3)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = MultiHeadAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        """(B, T, C) -> (B, T, C), or (B, C) -> (B, C): one token per row."""
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x
