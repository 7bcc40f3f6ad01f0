"""The loss: the cross-entropy of the next token, in nats."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.model import ops
from mlx_gpt.model.gpt import GPT

CHUNK = 256  # positions whose logits are in memory at once, if the loss is computed in chunks
LARGE = 1 << 24  # logits from which on, 64 MiB, chunks save memory at no measurable cost in time


def next_token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return -log p(target) at each position: logits (B, T, V), targets (B, T) -> nats (B, T)."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def mean_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the mean of ``next_token_losses``, in nats per token. Uniform probabilities give ln V."""
    return next_token_losses(logits, targets).mean()


def batch_loss(model: GPT, x: mx.array, targets: mx.array) -> mx.array:
    """Return the mean loss of targets (B, T), given the residual stream after the final norm, x (B, T, C)."""
    if in_chunks(targets.size * model.config.vocab_size, x.dtype):
        return chunked_mean_loss(x, model.head_weight, targets)
    return mean_loss(model.logits(x), targets)


def in_chunks(logits: int, dtype: mx.Dtype) -> bool:
    """Return whether to compute the loss in chunks: it saves memory, and with the CPU kernels a second exp."""
    return logits >= LARGE or ops.custom_kernels(dtype)


def chunked_mean_loss(x: mx.array, head: mx.array, targets: mx.array, rows: int = CHUNK) -> mx.array:
    """Return ``mean_loss(x @ head.T, targets)`` with the logits of only ``rows`` positions in memory at a time.

    x (B, T, C), head (V, C), targets (B, T). The forward pass computes the gradients too, chunk by chunk, since they
    need the same logits: d loss / d logits is the probabilities, minus one at the target.
    """
    flat, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)  # (N, C), (N, 1)

    @mx.custom_function
    def total_loss(flat: mx.array, head: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        total, d_head = mx.array(0.0), mx.zeros(head.shape)
        d_flat: list[mx.array] = []
        for i in range(0, len(flat), rows):
            # depends: one chunk after the other, otherwise all their logits are in memory at once
            chunk, target = mx.depends([flat[i : i + rows], flat_targets[i : i + rows]], [d_head, total, *d_flat[-1:]])
            logits = (chunk @ head.T).astype(mx.float32)  # (rows, V)
            highest, at_target = logits.max(axis=-1, keepdims=True), mx.take_along_axis(logits, target, axis=-1)
            (logits,) = mx.depends([logits], [at_target])  # exp is their last use and may take their memory
            exp_logits = ops.exp(logits - highest)
            row_sum = exp_logits.sum(axis=-1, keepdims=True)
            total = total + (mx.log(row_sum) + (highest - at_target)).sum()
            d_logits = exp_logits / row_sum
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
