"""The loss follows its formula; in chunks it equals that of all positions at once."""

from __future__ import annotations

from math import log

import mlx.core as mx
import numpy as np
import pytest
from helpers.small_training import batch, distance, new_small, peak

from mlx_gpt.train.loss import chunked_mean_loss, mean_loss, next_token_losses


def test_uniform_predictions_have_a_loss_of_ln_v() -> None:
    logits, targets = mx.zeros((2, 5, 50257)), mx.array([[0, 1, 2, 3, 50256]] * 2)
    assert mean_loss(logits, targets).item() == pytest.approx(log(50257), rel=1e-6)
    assert mean_loss(new_small()(batch()[0]), batch()[1]).item() == pytest.approx(log(257), abs=0.02)


def test_the_loss_is_minus_the_log_probability_of_the_target() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 7)).astype(np.float32), rng.integers(0, 7, (2, 3))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    found = next_token_losses(mx.array(logits), mx.array(targets))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    assert mean_loss(mx.array(logits), mx.array(targets)).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_the_loss_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = mx.random.normal((1, 4, 5000)).astype(mx.bfloat16)
    exact = next_token_losses(logits.astype(mx.float32), mx.zeros((1, 4), mx.int32))
    assert mx.allclose(next_token_losses(logits, mx.zeros((1, 4), mx.int32)), exact, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 16, 64, 1000])
def test_chunks_give_the_same_loss_and_gradients(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, head = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in [(2, 32, 16), (400, 16)])
    y = mx.array(rng.integers(0, 400, (2, 32)))
    whole = mx.value_and_grad(lambda x, head: 3 * mean_loss(x @ head.T, y), argnums=(0, 1))
    chunks = mx.value_and_grad(lambda x, head: 3 * chunked_mean_loss(x, head, y, rows=rows), argnums=(0, 1))
    loss, gradients = whole(x, head)
    for run in (chunks, mx.compile(chunks)):
        chunked_loss, chunked_gradients = run(x, head)
        assert chunked_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert all(distance(a, b) < 1e-6 for a, b in zip(chunked_gradients, gradients, strict=True))


def test_chunks_handle_logits_whose_exp_overflows() -> None:
    x, y = mx.array([[[1000.0]]]), mx.array([[1]])
    loss, gradient = mx.value_and_grad(lambda x: chunked_mean_loss(x, mx.array([[1.0], [0.0]]), y))(x)
    assert loss.item() == pytest.approx(1000)
    assert gradient.item() == pytest.approx(1)


@pytest.mark.freed_at_once
def test_only_one_chunks_logits_are_in_memory() -> None:
    x, head = mx.random.normal((1, 2048, 4)), mx.random.normal((4000, 4))
    y = mx.zeros((1, 2048), mx.int32)
    mx.eval(x, head, y)
    all_logits = 4 * 2048 * 4000
    whole = peak(lambda: mx.grad(lambda x: mean_loss(x @ head.T, y))(x))
    chunked = peak(lambda: mx.grad(lambda x: chunked_mean_loss(x, head, y, rows=128))(x))
    assert whole > all_logits
    assert chunked < all_logits / 3
