"""Gradient checkpointing: the backward pass recomputes the inside of each block, which saves memory for time."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.model.block import Block
from mlx_gpt.model.dropout import Dropout
from mlx_gpt.model.gpt import GPT


def hidden_recomputed(model: GPT, tokens: mx.array) -> mx.array:
    """Return ``model.hidden``, saving only the input of each block (Chen et al. 2016): ids (B, T) -> (B, T, C)."""
    x = model.embed(tokens)
    for block in model.h:
        x = _checkpointed(block, x)
    return model.ln_f(x)


def _checkpointed(block: Block, x: mx.array) -> mx.array:
    # Keys drawn outside of the checkpoint give both passes the same dropout masks.
    dropouts = [module for module in block.modules() if isinstance(module, Dropout) and module.p > 0]
    keys = [mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) for _ in dropouts]

    def compute(x: mx.array) -> mx.array:
        for dropout, key in zip(dropouts, keys, strict=True):
            dropout.key = key
        y = block(x)
        for dropout in dropouts:
            dropout.key = None
        return y

    return nn.utils.checkpoint(block, compute)(x)
