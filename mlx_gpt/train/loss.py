"""The loss: how surprised the model is by the token that comes, in nats."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.linux_cpu import kernels as cpu

ROWS = 256  # positions whose logits are in memory at once, where the loss goes in chunks
LARGE = 1 << 24  # logits: from 64 MiB on, chunks save memory and cost no time that one could measure


def next_token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """-log p(target) at each position: logits (B, T, V), targets (B, T) -> nats (B, T)."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def mean_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """The mean over all positions, in nats per token: what training lowers. A model that knows nothing has ln V."""
    return next_token_losses(logits, targets).mean()


def in_chunks(logits: int, dtype: mx.Dtype) -> bool:
    """Whether the loss of so many logits should go in chunks: for memory, or on a CPU for one exp, not two."""
    return logits >= LARGE or cpu.suits(dtype)


def chunked_mean_loss(x: mx.array, head: mx.array, targets: mx.array, rows: int = ROWS) -> mx.array:
    """``mean_loss(x @ head.T, targets)`` with the logits of only ``rows`` positions in memory at a time.

    x (B, T, C), the residual stream after the final norm; head (V, C); targets (B, T) -> nats per token. Also the
    gradients are made on the way forward, chunk by chunk, since they need the same logits: d loss / d logits is the
    model's probabilities, less one at the target.
    """
    flat, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)  # (N, C), (N, 1)

    @mx.custom_function
    def total_loss(flat: mx.array, head: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        total, d_head = mx.array(0.0), mx.zeros(head.shape)
        d_flat: list[mx.array] = []
        for i in range(0, len(flat), rows):
            # One chunk after the other, or all their logits would be alive at once.
            chunk, target = mx.depends([flat[i : i + rows], wanted[i : i + rows]], [d_head, total, *d_flat[-1:]])
            logits = (chunk @ head.T).astype(mx.float32)  # (rows, V)
            highest, at_target = logits.max(axis=-1, keepdims=True), mx.take_along_axis(logits, target, axis=-1)
            (logits,) = mx.depends([logits], [at_target])  # exp needs them last, and may have their memory
            odds = cpu.exp(logits - highest) if cpu.suits(logits.dtype) else mx.exp(logits - highest)
            of_all = odds.sum(axis=-1, keepdims=True)
            total = total + (mx.log(of_all) + (highest - at_target)).sum()
            d_logits = odds / of_all
            d_logits = d_logits.at[mx.arange(len(target)), target[:, 0]].subtract(1.0).astype(flat.dtype)
            d_flat.append(d_logits @ head)
            d_head = d_head + d_logits.T @ chunk
        return total, mx.concatenate(d_flat), d_head.astype(head.dtype)

    @total_loss.vjp
    def scaled(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        _, d_flat, d_head = outputs
        scale = cotangents[0]
        return (d_flat * scale).astype(d_flat.dtype), (d_head * scale).astype(d_head.dtype)

    outputs: Any = total_loss(flat, head)
    return outputs[0] / len(flat)
