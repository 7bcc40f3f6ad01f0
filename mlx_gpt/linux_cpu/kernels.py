"""The same mathematics for MLX's CPU backend: exp as products and sums, and attention that keeps no large pattern.

On Linux that backend calls a scalar exp for every number, and once products are fast a model spends most of its time
there. What ``mx.compile`` makes of products and sums, the C++ compiler turns into vector instructions. So exp is
written as those, about nine times as fast (and with a relative error of 4e-7, MLX's 1e-7), and attention and GELU with
it, each with its gradient by hand. Layer norm is here for its rounding. A GPU has all of this in ``mx.fast``;
``tests/linux_cpu/test_kernels.py`` shows that the results are the same.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import ceil, factorial, gcd, pi, sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.device import on_cpu

ROWS = 160  # queries at a time: of the keys, none sees more than its last one may
PART = 16  # terms of a sum that are added by themselves
FEW = 4096  # numbers for which one operation with MLX's exp takes less time than several with the one below
HALVINGS, SQUARINGS, DEGREE = 9, 3, 6
NEVER = -144.0  # from here on the result of ``exp`` is exactly 0


def suits(dtype: mx.Dtype) -> bool:
    """Whether these forms are for arrays of this type: float32, on a CPU. Asked when a function is traced."""
    return dtype == mx.float32 and on_cpu()


@mx.compile  # not shapeless: then MLX would write every scalar out as an array
def exp(x: mx.array) -> mx.array:
    """e^x for x <= 0, elementwise, float32, in products and sums only; exactly 0 from -144 down, -inf included.

    With h = x / 2^9, m = e^h - 1 is a short Taylor series, and m (m + 2) = e^2h - 1 doubles h. Less one, since a small
    m has digits that 1 + m has not; only the last three doublings, each twice the error, are plain squares.
    """
    h = mx.maximum(x, NEVER) * (1 / 2**HALVINGS)
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
    """GPT-2's GELU, x sigmoid(2z) with z = sqrt(2/pi) (x + 0.044715 x^3), elementwise."""
    y: Any = _gelu_new(x)
    return y


@mx.custom_function
def _gelu_new(x: mx.array) -> mx.array:
    return x * _gate(x)


@_gelu_new.vjp
def _gelu_new_vjp(x: mx.array, d_y: mx.array, y: mx.array) -> mx.array:
    gate = _gate(x)
    slope = (2 * sqrt(2 / pi)) * (1 + (3 * 0.044715) * x * x)  # of 2z
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
    """Of x, where ``small`` is e^-|x|."""
    return mx.where(x >= 0, 1.0, small) / (1 + small)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """``mx.fast.layer_norm`` over the last axis, (..., C) -> (..., C), with a third of its rounding."""
    apart = x - _mean(x)
    return apart * mx.rsqrt(_mean(apart * apart) + eps) * weight + bias


def _mean(x: mx.array) -> mx.array:
    # MLX adds a row to a few running sums; sums of sums are shorter. (..., C) -> (..., 1)
    C = x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, gcd(C, PART)).sum(-1).sum(-1, keepdims=True) / C


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """``attention.attend``: (B, H, T, D), (B, H, S, D) twice -> (B, H, T, D).

    A long sequence goes a block of queries at a time, and nothing of size T x S is kept for the way back: the logarithm
    of each row's sum is enough to make its pattern again (Dao et al. 2022, section 3). Half of the scores, those of the
    future, are never computed. A short one keeps its pattern: to make it again would take a third more time.
    """
    attend: Any = _attend if keeps_pattern(k.shape[-2]) else _attend_in_blocks
    return attend(q * scale, mx.contiguous(k), mx.contiguous(v))[0]  # or every product would copy its share


def masked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
    """The same where the mask, (T, S) or (B, 1, T, S), says which keys a query may see: True for at least one.

    A block of queries at a time, too, but for reading only: on the way back all patterns would be alive.
    """
    B, H, T, _ = q.shape
    if B * H * T * k.shape[-2] <= FEW:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    moved: list[mx.array] = []
    for start in range(0, T, ROWS):
        rows = slice(start, start + ROWS)
        (block,) = mx.depends([q[..., rows, :] * scale], moved[-1:])  # one after the other
        odds, of_all, _ = _odds(block, k, mx.where(mask[..., rows, :], 0.0, -mx.inf))
        moved.append(odds @ v / of_all)
    return mx.concatenate(moved, axis=-2)


def keeps_pattern(S: int) -> bool:
    """Whether a sequence is short enough that its pattern is kept for the way back."""
    return S <= ROWS


def _odds(q: mx.array, k: mx.array, never: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What the pattern is a share of, (B, H, T, S), then for each row the whole and the highest score, (B, H, T, 1).

    ``never`` is -inf for the keys that a query may not see, else 0.
    """
    scores = _apart(q @ k.swapaxes(-1, -2) + never)
    highest = scores.max(axis=-1, keepdims=True)
    odds = exp(_apart(scores - highest))
    return odds, odds.sum(axis=-1, keepdims=True), highest


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    odds, of_all, _ = _odds(q, k, _future(q.shape[-2], k.shape[-2]))
    return odds @ v / of_all, odds, of_all


@_attend.vjp
def _attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
    (q, k, v), (moved, odds, of_all) = primals, outputs
    # A row's softmax has the gradient pattern * (d_pattern - sum(pattern * d_pattern)); that sum is d_moved . moved.
    # The pattern is odds / of_all: the smaller factor is divided.
    d_moved = cotangents[0] / of_all
    d_scores = odds * (d_moved @ v.swapaxes(-1, -2) - (d_moved * moved).sum(axis=-1, keepdims=True))
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, odds.swapaxes(-1, -2) @ d_moved


@mx.custom_function
def _attend_in_blocks(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    moved: list[mx.array] = []
    log_sums: list[mx.array] = []
    for rows, seen, future in _blocks(q.shape[-2], k.shape[-2]):
        (block,) = mx.depends([q[..., rows, :]], moved[-1:])  # one after the other, or all would be alive at once
        odds, of_all, highest = _odds(block, k[..., seen, :], future)
        moved.append(odds @ v[..., seen, :] / of_all)
        log_sums.append(highest + mx.log(of_all))
    return mx.concatenate(moved, axis=-2), mx.concatenate(log_sums, axis=-2)


@_attend_in_blocks.vjp
def _attend_in_blocks_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
    (q, k, v), (moved, log_sums), d_moved = primals, outputs, mx.contiguous(cotangents[0])
    # As in _attend_vjp, but what is to be subtracted from a whole row goes through the product as one more column: two
    # passes less.
    ones = mx.ones((*k.shape[:-1], 1))
    q_less = mx.concatenate([q, -log_sums], axis=-1)
    d_less = mx.concatenate([d_moved, -(d_moved * moved).sum(axis=-1, keepdims=True)], axis=-1)
    k_one, v_one = (mx.concatenate([x, ones], axis=-1).swapaxes(-1, -2) for x in (k, v))  # (B, H, D + 1, S)
    d_q: list[mx.array] = []
    d_k, d_v = mx.zeros_like(k), mx.zeros_like(v)
    for rows, seen, future in _blocks(q.shape[-2], k.shape[-2]):
        block, d_block = mx.depends([q_less[..., rows, :], d_less[..., rows, :]], [d_k, d_v, *d_q[-1:]])
        pattern = exp(_apart(block @ k_one[..., seen] + future))  # (B, H, t, s)
        d_scores = pattern * (d_block @ v_one[..., seen])
        d_q.append(d_scores @ k[..., seen, :])
        d_k = d_k.at[..., seen, :].add(d_scores.swapaxes(-1, -2) @ q[..., rows, :])
        d_v = d_v.at[..., seen, :].add(pattern.swapaxes(-1, -2) @ d_moved[..., rows, :])
    return mx.concatenate(d_q, axis=-2), d_k, d_v


def _blocks(T: int, S: int) -> list[tuple[slice, slice, mx.array]]:
    """Which queries, which keys they may see, and -inf (t, s) where one of those lies in the future of a query."""
    n = ceil(T / ROWS)
    ends = [T * i // n for i in range(n + 1)]
    blocks = []
    for start, end in pairwise(ends):
        last = S - T + end
        blocks.append((slice(start, end), slice(0, last), _future(end - start, last)))
    return blocks


@lru_cache(64)
def _future(t: int, s: int) -> mx.array:
    """(t, s): -inf where a key is in the future of a query, else 0. A constant: made once, not in every layer."""
    return mx.array(np.where(np.arange(s - t, s)[:, None] >= np.arange(s), 0.0, -np.inf).astype(np.float32))


def _apart(x: mx.array) -> mx.array:
    """The same, as an array of its own: fused with the sum along a row, exp would not become vector instructions."""
    return mx.stop_gradient(x)
