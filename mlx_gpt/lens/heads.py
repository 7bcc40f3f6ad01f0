"""Scores of attention heads, read from their patterns. All return arrays (n_layer, H) unless stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.hooks import Edit
from mlx_gpt.lens.trace import trace
from mlx_gpt.model.gpt import GPT, as_ids

KINDS = ("previous token", "duplicate token", "induction")


def patterns(activations: Mapping[str, mx.array]) -> mx.array:
    """Return the attention patterns of all layers of a trace: (n_layer, B, H, T, T)."""
    names = [name for name in activations if name.endswith("hook_pattern")]
    if not names:
        raise UsageError("these activations hold no pattern; trace with names='blocks.*.attn.hook_pattern'")
    return mx.stack([activations[name] for name in names])


def attention_to(pattern: mx.array, distance: int, first: int = 0) -> mx.array:
    """Return the mean weight of the key ``distance`` tokens back, over queries from ``first`` and the batch.

    (n_layer, B, H, T, T) -> (n_layer, H).
    """
    first = max(first, distance)
    if first >= pattern.shape[-1]:
        raise UsageError(f"the text has {pattern.shape[-1]} tokens; looking {distance} back needs a longer one")
    diagonal = mx.diagonal(pattern, offset=-distance, axis1=-2, axis2=-1)  # query distance + i, key i
    return diagonal[..., first - distance :].mean(axis=(1, 3))


def head_scores(
    model: GPT,
    length: int = 50,
    batch: int = 4,
    seed: int = 0,
    start: int | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> dict[str, mx.array]:
    """Return three scores of each head on random tokens that are repeated once, as in Olsson et al. 2022.

    "previous token": the mean weight of the token before. "duplicate token": in the repetition, of the same token in
    the first part. "induction": of the token after that one. ``start`` is an id to begin with, such as that of
    ``<|endoftext|>``. A head without preference gives each key about 1/T.
    """
    tokens = repeated_tokens(model.config.vocab_size, length, batch, seed, start)
    _, activations = trace(model, tokens, edits, names="blocks.*.attn.hook_pattern")
    pattern = patterns(activations)
    second = tokens.shape[1] - length  # where the repetition begins
    return {
        "previous token": attention_to(pattern, 1),
        "duplicate token": attention_to(pattern, length, second),
        "induction": attention_to(pattern, length - 1, second),
    }


def repeated_tokens(vocab_size: int, length: int, batch: int, seed: int = 0, start: int | None = None) -> mx.array:
    """Return random ids that are repeated once, with ``start`` before them unless None: (B, 2 length) or one more."""
    if length < 2:
        raise UsageError(f"a repeated sequence has at least 2 tokens, not {length}")
    once = np.random.default_rng(seed).integers(0, vocab_size, (batch, length))
    first = np.full((batch, 0 if start is None else 1), start or 0)
    return mx.array(np.concatenate([first, once, once], axis=1).astype(np.int32))


def detection_pattern(tokens: Any, kind: str) -> mx.array:
    """Return where a head of a kind attends in a text, ids (B, T): (B, T, T), 1 there and 0 elsewhere.

    "previous token": the token before. "duplicate token": earlier occurrences of the query's token. "induction": the
    tokens after those.
    """
    if kind not in KINDS:
        raise UsageError(f"a kind of head is one of {', '.join(KINDS)}, not {kind!r}")
    tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens)
    T = tokens.shape[1]
    query, key = mx.arange(T)[:, None], mx.arange(T)[None, :]
    if kind == "previous token":
        found = mx.broadcast_to(key == query - 1, (tokens.shape[0], T, T))
    else:
        found = (tokens[:, :, None] == tokens[:, None, :]) & (key < query)
        if kind == "induction":  # one key further
            found = mx.pad(found[..., :-1], [(0, 0), (0, 0), (1, 0)]) & (key <= query)
    return found.astype(mx.float32)


def detect_heads(
    model: GPT, tokens: Any, kind: str, *, exclude_first: bool = False, exclude_current: bool = False
) -> mx.array:
    """Return the share of each head's attention that goes where a head of a kind attends, averaged over texts (B, T).

    TransformerLens's ``detect_head`` with the measure "mul". ``exclude_first`` leaves attention to the first token out
    of the count, ``exclude_current`` that to the query's own.
    """
    tokens = as_ids(tokens, model.config.vocab_size)
    _, activations = trace(model, tokens, names="blocks.*.attn.hook_pattern")
    pattern, T = patterns(activations), tokens.shape[1]
    if exclude_first:
        pattern = pattern * (mx.arange(T) > 0)
    if exclude_current:
        pattern = pattern * (1 - mx.eye(T))
    matched = (pattern * detection_pattern(tokens, kind)[:, None]).sum(axis=(-1, -2))  # (n_layer, B, H)
    return (matched / pattern.sum(axis=(-1, -2))).mean(axis=1)


def attention_entropy(activations: Mapping[str, mx.array]) -> mx.array:
    """Return the entropy of each query's attention, in nats: (n_layer, B, H, T). 0 is one key, log(n) is n equally."""
    pattern = patterns(activations).astype(mx.float32)
    return -mx.where(pattern > 0, pattern * mx.log(mx.where(pattern > 0, pattern, 1)), 0).sum(axis=-1)


def first_token_mass(activations: Mapping[str, mx.array]) -> mx.array:
    """Return the weight that each query gives to the first token: (n_layer, B, H, T).

    Many heads attend there when they have nothing to move (Xiao et al. 2023, "Efficient Streaming Language Models with
    Attention Sinks").
    """
    return patterns(activations)[..., 0]
