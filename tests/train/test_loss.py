"""The loss in chunks equals the loss of all positions at once."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.small_training import distance, peak

from mlx_gpt.train.loss import chunked_mean_loss, mean_loss


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
