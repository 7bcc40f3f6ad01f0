"""Ablation: the loss of a text without each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.hooks import Edit
from mlx_gpt.lens.patching import block_names, masks, replace
from mlx_gpt.lens.trace import trace
from mlx_gpt.model.gpt import GPT, as_ids
from mlx_gpt.train.loss import mean_loss


def ablate_heads(
    model: GPT,
    tokens: Any,
    mode: str = "zero",
    reference: Any = None,
    seed: int = 0,
    edits: Mapping[str, Edit] | None = None,
) -> mx.array:
    """Return how much the loss of a text, ids (B, T), rises without each head: (n_layer, H), in nats per token.

    The head's z is replaced. ``zero``: by 0. ``mean``: by its mean over a reference text, all rows and positions.
    ``resample``: by that of another row of the reference, drawn with ``seed``; the reference then has the text's shape,
    and at least two rows. The default reference is the text itself. All runs are under ``edits``.
    """
    ids = as_ids(tokens, model.config.vocab_size)
    if ids.shape[1] < 2:
        raise UsageError("a loss needs a text of at least 2 tokens")
    resid, zs = block_names(model, "hook_resid_pre"), block_names(model, "attn.hook_z")
    logits, base = trace(model, ids, edits, [*resid, *zs])
    other = base if reference is None else trace(model, reference, edits, zs)[1]
    loss = mean_loss(logits[:, :-1], ids[:, 1:])
    rows = []
    for start, name in zip(resid, zs, strict=True):
        instead = replacement(other[name], base[name], mode, seed)
        for mask in masks(base[name], (2,)):
            held = {start: replace(base[start]), name: replace(mx.where(mask, instead, base[name]))}
            ablated, _ = trace(model, ids, {**(edits or {}), **held}, ())
            rows.append(mean_loss(ablated[:, :-1], ids[:, 1:]) - loss)
            mx.eval(rows[-1])
    return mx.stack(rows).reshape(model.config.n_layer, model.config.n_head)


def replacement(z: mx.array, base: mx.array, mode: str, seed: int) -> mx.array:
    """Return what replaces z (B, T, H, D) in an ablation, in a shape that broadcasts to that of ``base``."""
    if mode == "zero":
        return mx.zeros_like(base)
    if mode == "mean":
        return z.mean(axis=(0, 1), keepdims=True)
    if mode != "resample":
        raise UsageError(f"a head is ablated by zero, mean or resample, not {mode!r}")
    B = z.shape[0]
    if z.shape != base.shape or B < 2:
        raise UsageError("resampling takes another row of a reference of the text's shape, with at least two rows")
    shift = mx.random.randint(1, B, (), key=mx.random.key(seed))  # no row is its own replacement
    return z[(mx.arange(B) + shift) % B]
