"""The loss: how surprised the model is by the token that comes, in nats."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def next_token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """-log p(target) at each position: logits (B, T, V), targets (B, T) -> nats (B, T)."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def mean_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """The mean over all positions, in nats per token: what training lowers. A model that knows nothing has ln V."""
    return next_token_losses(logits, targets).mean()
