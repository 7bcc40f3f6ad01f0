"""Attention: queries ask, keys answer, the pattern weighs, values move.

First as four small functions on the trailing axes (Vaswani et al. 2017, equation 1), then as one head,
then as all heads of a layer in one product and the fused kernel. ``tests/model/test_attention.py`` shows that
the three are equal.
"""

from __future__ import annotations

from math import sqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.model import ops
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.dropout import Dropout


def attention_scores(q: mx.array, k: mx.array, scale: float) -> mx.array:
    """Return how well each key answers each query: ``q @ k.T * scale``. (..., T, D), (..., S, D) -> (..., T, S).

    A dot product of D independent terms grows like sqrt(D); ``scale = 1/sqrt(D)`` keeps the softmax from
    saturating on one key, where its gradient vanishes.
    """
    return (q @ k.swapaxes(-1, -2)) * scale


def causal_mask(T: int, S: int) -> mx.array:
    """Return the causal mask, boolean (T, S): True where query i may attend to key j, which is not in its future.

    The T queries are the last T of S tokens, so query i is at position S - T + i.
    """
    return mx.arange(S - T, S)[:, None] >= mx.arange(S)[None, :]


def attention_pattern(scores: mx.array, mask: mx.array) -> mx.array:
    """Return the softmax over the keys that the mask allows: (..., T, S) -> (..., T, S); each row sums to one.

    Masked scores are -inf *before* the softmax, so their weight is exactly zero and the rest still sums to one.
    """
    return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1, precise=True)


def weighted_values(pattern: mx.array, v: mx.array) -> mx.array:
    """Return the average of the values, weighted by the pattern. (..., T, S), (..., S, D) -> (..., T, D)."""
    return pattern @ v


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Return causal attention, as the four functions above: (..., T, D), (..., S, D) twice -> (..., T, D)."""
    mask = causal_mask(q.shape[-2], k.shape[-2])
    return weighted_values(attention_pattern(attention_scores(q, k, scale), mask), v)


def split_heads(x: mx.array, n_head: int) -> mx.array:
    """Split the width into heads: (B, T, H D), or (B, H D) with one token per row -> (B, H, T, D)."""
    B, D = x.shape[0], x.shape[-1] // n_head
    T = x.size // (B * n_head * D)
    if T == 1:  # the order is right already
        return x.reshape(B, n_head, 1, D)
    return x.reshape(B, T, n_head, D).swapaxes(1, 2)


def merge_heads(x: mx.array) -> mx.array:
    """Undo ``split_heads``: (B, H, T, D) -> (B, T, H D)."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


class AttentionHead(nn.Module):
    """One head in the form of the explanation: it reads the residual stream and returns its addition to it.

    Weights: ``query``, ``key``, ``value`` from width C to D with bias, ``output`` from D back to C without (the
    output bias belongs to the layer, not to one head). ``scale`` is what the scores are multiplied by.
    """

    def __init__(self, n_embd: int, head_dim: int, scale: float | None = None):
        super().__init__()
        self.scale = 1 / sqrt(head_dim) if scale is None else scale
        self.query = nn.Linear(n_embd, head_dim)
        self.key = nn.Linear(n_embd, head_dim)
        self.value = nn.Linear(n_embd, head_dim)
        self.output = nn.Linear(head_dim, n_embd, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, C) -> (B, T, C). The sum over the heads of a layer plus its output bias is the layer's output."""
        q = self.query(x)  # what each token asks for          (B, T, D)
        k = self.key(x)  # what each token answers to          (B, T, D)
        scores = attention_scores(q, k, self.scale)  # how well they match   (B, T, T)
        mask = causal_mask(x.shape[1], x.shape[1])  # no key of the future   (T, T)
        pattern = attention_pattern(scores, mask)  # rows that sum to one    (B, T, T)
        v = self.value(x)  # what each token has to give       (B, T, D)
        attended = weighted_values(pattern, v)  # what each token receives   (B, T, D)
        return self.output(attended)  # back to the full width          (B, T, C)


class MultiHeadAttention(nn.Module):
    """All heads of a layer at once: one product for q, k and v, one fused kernel, one output product.

    The weights are GPT-2's: ``c_attn`` (C -> 3C: q, k and v, each of H heads of width D) and ``c_proj`` (C -> C).
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.scale = 1 / sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        """(B, T, C) -> (B, T, C), or (B, C) -> (B, C). With a cache the tokens also attend to the earlier ones."""
        q, k, v = mx.split(split_heads(self.c_attn(x), 3 * self.n_head), 3, axis=1)  # (B, H, T, D) each
        mask: mx.array | str = "causal"
        if cache is not None:
            k, v, mask = cache.extend(k, v)  # (B, H, S, D) each
        if self.training and self.attn_dropout.p > 0:  # the fused kernel has no dropout
            pattern = attention_pattern(attention_scores(q, k, self.scale), causal_mask(q.shape[2], k.shape[2]))
            attended = weighted_values(self.attn_dropout(pattern), v)
        else:
            attended = ops.attention(q, k, v, self.scale, mask)  # (B, H, T, D)
        merged = attended.reshape(x.shape) if attended.shape[2] == 1 else merge_heads(attended)
        return self.resid_dropout(self.c_proj(merged))  # (B, T, C)

    def head(self, i: int) -> AttentionHead:
        """Return head i of this layer with its share of the fused weights as they are now.

        Raises ``ValueError`` for an i outside [0, H).
        """
        if not 0 <= i < self.n_head:
            raise ValueError(f"head must be between 0 and {self.n_head - 1}, not {i}")
        C = self.c_proj.weight.shape[0]
        D = C // self.n_head
        rows = slice(i * D, (i + 1) * D)
        head = AttentionHead(C, D, self.scale)
        weights = mx.split(self.c_attn.weight, 3)  # q, k, v: (C, C) each, out x in
        biases = mx.split(self.c_attn.bias, 3)
        for linear, weight, bias in zip((head.query, head.key, head.value), weights, biases, strict=True):
            linear.weight, linear.bias = weight[rows], bias[rows]  # (D, C), (D,)
        head.output.weight = self.c_proj.weight[:, rows]  # (C, D)
        return head
