"""Replacements for what is slow or less exact in MLX's CPU backend on Linux: exp, GELU, attention, layer norm.

That backend calls a scalar exp for every number, and once products are fast a model spends most of its time there.
``mx.compile`` turns products and sums into vector instructions, so exp is written with those: about nine times as fast,
with a relative error of 4e-7 (MLX's: 1e-7). Attention and GELU use it, each with a gradient written by hand. Layer norm
is here for its smaller rounding error. ``tests/linux_cpu/test_kernels.py`` compares them with MLX's own.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import ceil, factorial, gcd, pi, sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.device import on_cpu

BLOCK = 160  # queries in a block of attention
PARTIAL_SUM = 16  # terms in a partial sum of the layer norm
FEW = 4096  # elements up to which one operation with MLX's exp is faster than several with the exp below
FEW_ROWS = 8  # rows up to which one operation of MLX is faster than a layer norm of several
HALVINGS, SQUARINGS, DEGREE = 9, 3, 6
UNDERFLOW = -144.0  # exp of this and less is exactly 0


def supports(dtype: mx.Dtype) -> bool:
    """Return whether arrays of this type take these kernels now: float32, with a CPU as the default device."""
    return dtype == mx.float32 and on_cpu()


@mx.compile  # not shapeless: MLX would broadcast every scalar to an array
def exp(x: mx.array) -> mx.array:
    """Return e^x for x <= 0, elementwise, float32, from products and sums; exactly 0 for x <= -144, -inf included.

    With h = x / 2^9, m = e^h - 1 is a short Taylor series, and m (m + 2) = e^2h - 1 doubles h. Subtracting 1 keeps the
    digits of a small m; only the last three doublings, each of which doubles the error, are plain squares.
    """
    h = mx.maximum(x, UNDERFLOW) * (1 / 2**HALVINGS)
    m: Any = 1 / factorial(DEGREE)
    for i in range(DEGREE - 1, 0, -1):
        m = m * h + 1 / factorial(i)
    m = m * h
    for _ in range(HALVINGS - SQUARINGS):
        m = m * (m + 2.0)
    y = m + 1.0
    for _ in range(SQUARINGS):
        y = y * y
    return y


def gelu_new(x: mx.array) -> mx.array:
    """Return ``ops.gelu_new(x)``: x sigmoid(2z) with z = sqrt(2/pi) (x + 0.044715 x^3), elementwise."""
    if x.size <= FEW:
        return x * mx.sigmoid((2 * sqrt(2 / pi)) * (x + 0.044715 * x * x * x))
    y: Any = _gelu_new(x)
    return y


@mx.custom_function
def _gelu_new(x: mx.array) -> mx.array:
    return x * _gate(x)


@_gelu_new.vjp
def _gelu_new_vjp(x: mx.array, d_y: mx.array, y: mx.array) -> mx.array:
    gate = _gate(x)
    slope = (2 * sqrt(2 / pi)) * (1 + (3 * 0.044715) * x * x)  # d(2z)/dx
    return d_y * gate * (1 + x * slope * (1 - gate))


def _gate(x: mx.array) -> mx.array:
    """sigmoid(2z)."""
    two_z, below = _argument(x)
    return _sigmoid(two_z, exp(below))


@mx.compile
def _argument(x: mx.array) -> tuple[mx.array, mx.array]:
    """2z and -|2z|."""
    two_z = (2 * sqrt(2 / pi)) * (x + 0.044715 * x * x * x)
    return two_z, -mx.abs(two_z)


@mx.compile
def _sigmoid(x: mx.array, small: mx.array) -> mx.array:
    """Return sigmoid(x), given ``small`` = e^-|x|."""
    return mx.where(x >= 0, 1.0, small) / (1 + small)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Return ``mx.fast.layer_norm`` over the last axis, (..., C) -> (..., C), with a third of its rounding error."""
    if x.size // x.shape[-1] <= FEW_ROWS:
        return mx.fast.layer_norm(x, weight, bias, eps)
    centered = x - _mean(x)
    return centered * mx.rsqrt(_mean(centered * centered) + eps) * weight + bias


def _mean(x: mx.array) -> mx.array:
    # (..., C) -> (..., 1), as a sum of partial sums: MLX adds a whole row to a few running sums.
    C = x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, gcd(C, PARTIAL_SUM)).sum(-1).sum(-1, keepdims=True) / C


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str) -> mx.array:
    """Return ``ops.attention``: (B, H, T, D), (B, H, S, D) twice -> (B, H, T, D)."""
    if isinstance(mask, mx.array):
        return masked_attention(q, k, v, scale, mask)
    if q.shape[-2] == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    return causal_attention(q, k, v, scale)


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Return causal attention: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    A long sequence is computed in blocks of queries, and nothing of size T x S is saved for the backward pass, which
    recomputes the pattern from the logarithm of each row's sum (Dao et al. 2022, section 3). Scores of future keys are
    not computed. A short sequence saves its pattern: recomputing it would take a third more time.
    """
    attend: Any = _attend if saves_pattern(k.shape[-2]) else _attend_in_blocks
    return attend(q * scale, mx.contiguous(k), mx.contiguous(v))[0]  # contiguous, or every product copies its slice


def masked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
    """Return attention with a boolean mask, (T, S) or (B, 1, T, S), that has a True in every row.

    Computed in blocks of queries; for inference only, since a backward pass would save every block's pattern.
    """
    B, H, T, _ = q.shape
    if B * H * T * k.shape[-2] <= FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    attended: list[mx.array] = []
    for start in range(0, T, BLOCK):
        rows = slice(start, start + BLOCK)
        (block,) = mx.depends([q[..., rows, :] * scale], attended[-1:])  # one block at a time in memory
        exp_scores, row_sum, _ = _exp_scores(block, k, mx.where(mask[..., rows, :], 0.0, -mx.inf))
        attended.append(exp_scores @ v / row_sum)
    return mx.concatenate(attended, axis=-2)


def saves_pattern(S: int) -> bool:
    """Return whether attention over S keys saves its (T, S) pattern for the backward pass."""
    return S <= BLOCK


def _exp_scores(q: mx.array, k: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return exp(scores - row maximum) (B, H, T, S), its row sums and the row maxima (B, H, T, 1).

    ``bias`` is -inf for masked keys, else 0.
    """
    scores = _materialized(q @ k.swapaxes(-1, -2) + bias)
    highest = scores.max(axis=-1, keepdims=True)
    exp_scores = exp(_materialized(scores - highest))
    return exp_scores, exp_scores.sum(axis=-1, keepdims=True), highest


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    exp_scores, row_sum, _ = _exp_scores(q, k, _causal_bias(q.shape[-2], k.shape[-2]))
    return exp_scores @ v / row_sum, exp_scores, row_sum


@_attend.vjp
def _attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
    (q, k, v), (attended, exp_scores, row_sum) = primals, outputs
    # The gradient of a row's softmax is pattern * (d_pattern - sum(pattern * d_pattern)); the sum equals
    # d_attended . attended.
    # The pattern is exp_scores / row_sum; dividing d_attended instead divides fewer elements.
    d_attended = cotangents[0] / row_sum
    d_scores = exp_scores * (d_attended @ v.swapaxes(-1, -2) - (d_attended * attended).sum(axis=-1, keepdims=True))
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, exp_scores.swapaxes(-1, -2) @ d_attended


@mx.custom_function
def _attend_in_blocks(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    attended: list[mx.array] = []
    log_sums: list[mx.array] = []
    for rows, seen, bias in _blocks(q.shape[-2], k.shape[-2]):
        (block,) = mx.depends([q[..., rows, :]], attended[-1:])  # one block at a time in memory
        exp_scores, row_sum, highest = _exp_scores(block, k[..., seen, :], bias)
        attended.append(exp_scores @ v[..., seen, :] / row_sum)
        log_sums.append(highest + mx.log(row_sum))
    return mx.concatenate(attended, axis=-2), mx.concatenate(log_sums, axis=-2)


@_attend_in_blocks.vjp
def _attend_in_blocks_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
    (q, k, v), (attended, log_sums), d_attended = primals, outputs, mx.contiguous(cotangents[0])
    # As in _attend_vjp, but what is subtracted from a whole row is one more column of the product: two passes fewer.
    ones = mx.ones((*k.shape[:-1], 1))
    q_less = mx.concatenate([q, -log_sums], axis=-1)
    d_less = mx.concatenate([d_attended, -(d_attended * attended).sum(axis=-1, keepdims=True)], axis=-1)
    k_one, v_one = (mx.concatenate([x, ones], axis=-1).swapaxes(-1, -2) for x in (k, v))  # (B, H, D + 1, S)
    d_q: list[mx.array] = []
    d_k, d_v = mx.zeros_like(k), mx.zeros_like(v)
    for rows, seen, bias in _blocks(q.shape[-2], k.shape[-2]):
        block, d_block = mx.depends([q_less[..., rows, :], d_less[..., rows, :]], [d_k, d_v, *d_q[-1:]])
        pattern = exp(_materialized(block @ k_one[..., seen] + bias))  # (B, H, t, s)
        d_scores = pattern * (d_block @ v_one[..., seen])
        d_q.append(d_scores @ k[..., seen, :])
        d_k = d_k.at[..., seen, :].add(d_scores.swapaxes(-1, -2) @ q[..., rows, :])
        d_v = d_v.at[..., seen, :].add(pattern.swapaxes(-1, -2) @ d_attended[..., rows, :])
    return mx.concatenate(d_q, axis=-2), d_k, d_v


def _blocks(T: int, S: int) -> list[tuple[slice, slice, mx.array]]:
    """Return for each block its queries, the keys before its end, and the causal bias (t, s) between them."""
    n = ceil(T / BLOCK)
    ends = [T * i // n for i in range(n + 1)]
    blocks = []
    for start, end in pairwise(ends):
        last = S - T + end
        blocks.append((slice(start, end), slice(0, last), _causal_bias(end - start, last)))
    return blocks


@lru_cache(64)
def _causal_bias(t: int, s: int) -> mx.array:
    """Return the bias (t, s), -inf for future keys and else 0, as a constant that all layers share."""
    return mx.array(np.where(np.arange(s - t, s)[:, None] >= np.arange(s), 0.0, -np.inf).astype(np.float32))


def _materialized(x: mx.array) -> mx.array:
    """Return x, kept out of fusion: exp fused with the sum along a row does not become vector instructions."""
    return mx.stop_gradient(x)
