"""Attention: queries ask, keys answer, the pattern weighs, values move.

First as four small functions on the trailing axes (Vaswani et al. 2017, equation 1), then as one head,
then as all heads of a layer in one product and the fused kernel. ``tests/model/test_attention.py`` shows that
the three are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.linux_cpu import kernels as cpu
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.dropout import Dropout


def attention_scores(q: mx.array, k: mx.array, scale: float) -> mx.array:
    """How well each key answers each query: ``q @ k.T * scale``. (..., T, D), (..., S, D) -> (..., T, S).

    A dot product of D independent terms grows like sqrt(D); ``scale = 1/sqrt(D)`` keeps softmax out of
    the corner where one token takes everything and nothing is learned.
    """
    return (q @ k.swapaxes(-1, -2)) * scale


def causal_mask(T: int, S: int) -> mx.array:
    """Who may look at whom: True where key j is not in the future of query i. Boolean (T, S).

    The T queries are the last T of S tokens, so query i sits at position S - T + i.
    """
    return mx.arange(S - T, S)[:, None] >= mx.arange(S)[None, :]


def attention_pattern(scores: mx.array, mask: mx.array) -> mx.array:
    """Softmax over the keys a query may see; each row sums to one. (..., T, S) -> (..., T, S).

    The future gets -inf *before* the softmax, so its weight is exactly zero and the rest still sums to one.
    """
    return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1, precise=True)


def weighted_values(pattern: mx.array, v: mx.array) -> mx.array:
    """The average of the values, weighted by the pattern: what moves. (..., T, S), (..., S, D) -> (..., T, D)."""
    return pattern @ v


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention spelled out: the four steps above in one line. -> (..., T, D)."""
    mask = causal_mask(q.shape[-2], k.shape[-2])
    return weighted_values(attention_pattern(attention_scores(q, k, scale), mask), v)


def split_heads(x: mx.array, n_head: int) -> mx.array:
    """Cut the width into heads and put the heads beside the batch: (B, T, C) -> (B, H, T, D)."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x: mx.array) -> mx.array:
    """The way back: (B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


class AttentionHead(nn.Module):
    """One head, as the explanation tells it: it reads the residual stream and returns what it would add to it.

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
        """(B, T, C) -> (B, T, C). Sum the heads of a layer and add its output bias: that is the layer."""
        q = self.query(x)  # what each token asks for          (B, T, D)
        k = self.key(x)  # what each token answers to          (B, T, D)
        scores = attention_scores(q, k, self.scale)  # how well they match   (B, T, T)
        mask = causal_mask(x.shape[1], x.shape[1])  # nobody looks ahead     (T, T)
        pattern = attention_pattern(scores, mask)  # rows that sum to one    (B, T, T)
        v = self.value(x)  # what each token has to give       (B, T, D)
        moved = weighted_values(pattern, v)  # what each token receives      (B, T, D)
        return self.output(moved)  # written back at full width        (B, T, C)


class MultiHeadAttention(nn.Module):
    """All heads of a layer at once: one product for q, k and v, one fused kernel, one product out.

    The weights are GPT-2's own: ``c_attn`` (C -> 3C, the rows of q, k and v one below the other, each cut
    into H heads of D) and ``c_proj`` (C -> C).
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.scale = 1 / sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        """(B, T, C) -> (B, T, C), or (B, C) for one token; with a cache the tokens also see the ones before them."""
        q, k, v = self._heads(self.c_attn(x))  # (B, H, T, D) each
        mask: mx.array | str = "causal"
        if cache is not None:
            k, v, mask = cache.extend(k, v)  # (B, H, S, D) twice; the cache knows which tokens there are to see
        if self.training and self.attn_pdrop > 0:
            moved = self._attend_with_dropout(q, k, v)
        elif isinstance(mask, mx.array) and cpu.suits(q.dtype):
            moved = cpu.masked_attention(q, k, v, self.scale, mask)
        elif q.shape[2] > 1 and cpu.suits(q.dtype):
            moved = cpu.causal_attention(q, k, v, self.scale)
        else:
            moved = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)  # (B, H, T, D)
        merged = moved.reshape(x.shape) if x.ndim == 2 else merge_heads(moved)
        return self.resid_dropout(self.c_proj(merged))  # (B, T, C)

    def _heads(self, qkv: mx.array) -> Iterable[mx.array]:
        """(B, T, 3C), or (B, 3C) for one token -> (B, H, T, D) three times."""
        if qkv.ndim == 2:  # of one token they lie in that order already
            return mx.split(qkv.reshape(qkv.shape[0], 3 * self.n_head, 1, -1), 3, axis=1)
        return (split_heads(part, self.n_head) for part in mx.split(qkv, 3, axis=-1))

    def _attend_with_dropout(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        # The fused kernel has no dropout, so training with attn_pdrop > 0 takes the explicit form.
        mask = causal_mask(q.shape[-2], k.shape[-2])
        pattern = attention_pattern(attention_scores(q, k, self.scale), mask)  # (B, H, T, S)
        return weighted_values(self.attn_dropout(pattern), v)

    def head(self, i: int) -> AttentionHead:
        """Head i of this layer on its own, with its share of the fused weights.

        MLX arrays are values: after the layer has been trained further, take the head anew. Raises ``ValueError``
        for a head that is not there.
        """
        if not 0 <= i < self.n_head:
            raise ValueError(f"head must be between 0 and {self.n_head - 1}, not {i}")
        C = self.c_proj.weight.shape[0]
        D = C // self.n_head
        mine = slice(i * D, (i + 1) * D)
        head = AttentionHead(C, D, self.scale)
        weights = mx.split(self.c_attn.weight, 3)  # q, k, v: (C, C) each, out x in
        biases = mx.split(self.c_attn.bias, 3)
        for linear, weight, bias in zip((head.query, head.key, head.value), weights, biases, strict=True):
            linear.weight, linear.bias = weight[mine], bias[mine]  # (D, C), (D,)
        head.output.weight = self.c_proj.weight[:, mine]  # (C, D)
        return head
