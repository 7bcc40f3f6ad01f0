"""The kernels for MLX's CPU backend compute what the plain formulas do."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.linux_cpu import kernels
from mlx_gpt.model.attention import attend, attention_pattern, attention_scores, weighted_values
from mlx_gpt.model.mlp import gelu_new
from mlx_gpt.train.loss import chunked_mean_loss, in_chunks, mean_loss

pytestmark = pytest.mark.cpu


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def largest_difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max() / mx.abs(b).max())


def test_exp_is_nearly_as_exact_as_mlx_own() -> None:
    x = np.linspace(-15, 0, 100_001).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    error, mlx_error = (np.abs(np.array(f(mx.array(x))) / wanted - 1).max() for f in (kernels.exp, mx.exp))
    assert error < 1e-5
    assert np.abs(np.array(kernels.exp(mx.array(x))) - wanted).max() < 5e-7  # of a row whose largest is 1
    assert mlx_error < 1e-5


def test_exp_of_masked_scores_is_exactly_zero() -> None:
    assert kernels.exp(mx.array([0.0, -144.0, -1e30, -mx.inf])).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert np.isnan(kernels.exp(mx.array([mx.nan])).item())  # NaN stays NaN


def test_exp_is_never_negative_and_monotonic() -> None:
    y = np.array(kernels.exp(mx.array(np.linspace(-150, 0, 100_001).astype(np.float32))))
    assert (y >= 0).all()
    assert (np.diff(y) > -5e-7).all()  # up to rounding


def test_gelu_and_its_gradient_are_those_of_the_formula() -> None:
    x = mx.array(np.linspace(-12, 12, 4001).astype(np.float32))

    def formula(x: mx.array) -> mx.array:
        return 0.5 * x * (1 + mx.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))

    for compiled in (lambda f: f, mx.compile):
        assert mx.abs(compiled(kernels.gelu_new)(x) - formula(x)).max().item() < 2e-6
        slope, wanted = (mx.grad(compiled(lambda x, f=f: f(x).sum()))(x) for f in (kernels.gelu_new, formula))
        assert mx.abs(slope - wanted).max().item() < 5e-6


SHAPES = [(1, 1), (5, 5), (130, 130), (3, 130), (3, 200), (256, 300)]  # T, S: one block of queries and several


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("compiled", [lambda f: f, mx.compile], ids=["plain", "compiled"])
def test_attention_and_its_gradients_are_those_of_the_explicit_form(T: int, S: int, compiled: Callable) -> None:
    q, k, v = normal(2, 3, T, 8, seed=1), normal(2, 3, S, 8, seed=2), normal(2, 3, S, 8, seed=3)
    weight = normal(2, 3, T, 8, seed=4)  # another gradient for every element

    def loss(attention: Callable) -> Callable:
        return lambda q, k, v: (attention(3 * q, k, v, 0.5) * weight).sum()

    assert largest_difference(kernels.causal_attention(q, k, v, 0.5), attend(q, k, v, 0.5)) < 2e-6
    found, wanted = (
        compiled(mx.grad(loss(attention), argnums=(0, 1, 2)))(q, k, v)
        for attention in (kernels.causal_attention, attend)
    )
    for one, other in zip(found, wanted, strict=True):
        assert mx.abs(one - other).max().item() < 5e-6 * max(1.0, mx.abs(other).max().item())


@pytest.mark.parametrize(("T", "S"), [(1, 8), (1, 500), (200, 210)])  # fewer numbers than FEW; a block; two
@pytest.mark.parametrize("each_row", [False, True])
def test_attention_with_a_mask_is_the_explicit_form(T: int, S: int, each_row: bool) -> None:
    q, k, v = normal(4, 3, T, 8, seed=1), normal(4, 3, S, 8, seed=2), normal(4, 3, S, 8, seed=3)
    keys = mx.arange(S)  # the first three are masked for all queries, the middle one for none
    mask = (normal(4 if each_row else 1, 1, T, S, seed=4) > 0) & (keys > 2) | (keys == S // 2)
    mask = mask if each_row else mask[0, 0]
    wanted = weighted_values(attention_pattern(attention_scores(q, k, 0.5), mask), v)
    found = kernels.masked_attention(q, k, v, 0.5, mask)
    assert largest_difference(found, wanted) < 2e-6
    huge = mx.where(keys[:, None] > 2, v, 1e30)
    assert mx.array_equal(kernels.masked_attention(q, k, huge, 0.5, mask), found)


@pytest.mark.parametrize("T", [140, 260])  # the pattern is saved, or not
def test_no_query_attends_to_the_future(T: int) -> None:
    q, k, v = (normal(1, 1, T, 8, seed=seed) for seed in (1, 2, 3))
    huge = mx.where(mx.arange(T)[:, None] > 70, 1e30, v)
    before, after = (kernels.causal_attention(q, k, values, 1.0)[:, :, :71] for values in (v, huge))
    assert mx.array_equal(before, after)


@pytest.mark.parametrize("C", [24, 768, 1025])
def test_layer_norm_is_the_formula_with_less_rounding_than_mlx(C: int) -> None:
    x, weight, bias = normal(64, C) * 3 + 1, 1 + 0.1 * normal(C, seed=1), normal(C, seed=2)
    exact = np.array(x).astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    exact = exact * np.array(weight) + np.array(bias)
    ours, mlx = (
        float(np.sqrt(((np.array(form(x, weight, bias, 1e-5)) - exact) ** 2).mean()))
        for form in (kernels.layer_norm, mx.fast.layer_norm)
    )
    assert ours < (0.6 if C == 768 else 1.3) * mlx  # 24 and 1025 have few partial sums


def test_layer_norms_gradients_are_mlx_own() -> None:
    given, d_y = (normal(2, 5, 24), normal(24, seed=1), normal(24, seed=2)), normal(2, 5, 24, seed=3)
    ours, mlx = (
        mx.grad(lambda *given, form=form: (form(*given, 1e-5) * d_y).sum(), argnums=(0, 1, 2))(*given)
        for form in (kernels.layer_norm, mx.fast.layer_norm)
    )
    assert max(map(largest_difference, ours, mlx)) < 1e-6


def test_attention_saves_no_large_pattern_for_the_backward_pass() -> None:
    B, H, T, D = 1, 4, 512, 8
    x = normal(B, H, T, D)

    def peak(layers: int) -> int:
        def loss(x: mx.array) -> mx.array:
            for _ in range(layers):
                x = x + kernels.causal_attention(x, x, x, 0.3)
            return x.sum()

        mx.eval(x)
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss)(x))
        return mx.get_peak_memory()

    assert peak(12) - peak(4) < 8 * B * H * T * T * 4 / 4  # a quarter of what eight layers' patterns would take


def test_attention_with_a_mask_holds_one_block_at_a_time() -> None:
    B, H, T, D = 1, 1, 4096, 8
    x, mask = normal(B, H, T, D), mx.tri(T, dtype=mx.bool_)
    mx.eval(x, mask)
    mx.reset_peak_memory()
    mx.eval(kernels.masked_attention(x, x, x, 0.3, mask))
    assert mx.get_peak_memory() - mask.nbytes < B * H * T * T * 4  # the scores of all queries


def test_on_a_cpu_float32_takes_the_kernels_and_other_types_do_not() -> None:
    assert kernels.supports(mx.float32)
    assert not kernels.supports(mx.float16)
    many, few = normal(kernels.FEW + 1), normal(kernels.FEW)
    assert mx.array_equal(gelu_new(many), kernels.gelu_new(many))
    formula = few * mx.sigmoid((2 * sqrt(2 / pi)) * (few + 0.044715 * few * few * few))
    assert mx.array_equal(gelu_new(few), formula)  # one operation with MLX's own exp
    assert largest_difference(gelu_new(many)[1:], gelu_new(many[1:])) < 1e-6


@pytest.mark.parametrize("V", [7, 300])
def test_the_loss_with_one_exp_is_the_loss(V: int) -> None:
    x, head = normal(2, 150, 8, seed=1), normal(V, 8, seed=2)
    targets = mx.array(np.random.default_rng(0).integers(0, V, (2, 150)))
    assert in_chunks(2 * 150 * V, x.dtype)
    one = mx.value_and_grad(lambda x, head: chunked_mean_loss(x, head, targets), argnums=(0, 1))(x, head)
    other = mx.value_and_grad(lambda x, head: mean_loss(x @ head.T, targets), argnums=(0, 1))(x, head)
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-6)
    for a, b in zip(one[1], other[1], strict=True):
        assert largest_difference(a, b) < 2e-6
