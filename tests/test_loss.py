"""The loss in chunks, and what cannot come: the numbers are those of the formulas."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from small_training import distance, peak

from mlx_gpt.train.loss import UNLIKELIHOOD, chunked_mean_loss, mean_loss, unlikelihood, with_unlikelihood

B, T, V, K = 4, 24, 60, 3

# In chunks


@pytest.mark.parametrize("rows", [7, 16, 64, 1000])
def test_in_chunks_loss_and_gradients_are_the_same(rows: int) -> None:
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


def test_chunks_survive_logits_that_would_overflow() -> None:
    x, y = mx.array([[[1000.0]]]), mx.array([[1]])
    loss, gradient = mx.value_and_grad(lambda x: chunked_mean_loss(x, mx.array([[1.0], [0.0]]), y))(x)
    assert loss.item() == pytest.approx(1000)
    assert gradient.item() == pytest.approx(1)


@pytest.mark.freed_at_once
def test_chunks_have_only_one_chunks_logits_in_memory() -> None:
    x, head = mx.random.normal((1, 2048, 4)), mx.random.normal((4000, 4))
    y = mx.zeros((1, 2048), mx.int32)
    mx.eval(x, head, y)
    all_logits = 4 * 2048 * 4000
    whole = peak(lambda: mx.grad(lambda x: mean_loss(x @ head.T, y))(x))
    chunked = peak(lambda: mx.grad(lambda x: chunked_mean_loss(x, head, y, rows=128))(x))
    assert whole > all_logits
    assert chunked < all_logits / 3


# What cannot come


@pytest.fixture
def example() -> tuple[mx.array, mx.array, mx.array, mx.array]:
    rng = np.random.default_rng(0)
    x, head = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in [(B, T, 16), (V, 16)])
    targets, excluded = rng.integers(0, V, (B, T)), rng.integers(-1, V, (B, T, K))
    excluded[rng.random((B, T)) < 0.7] = -1
    return x, head, mx.array(targets), mx.array(excluded)


def test_unlikelihood_is_what_the_paper_says(example: tuple[mx.array, ...]) -> None:
    x, head, _, excluded = example
    logits = np.array(x @ head.T, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = [
        -np.log(1 - p[b, t, token]) for b, t, k in np.ndindex(B, T, K) if (token := int(excluded[b, t, k].item())) >= 0
    ]
    assert len(by_hand) > 40
    assert unlikelihood(mx.array(logits), excluded).item() == pytest.approx(sum(by_hand) / (B * T), rel=1e-5)


@pytest.mark.parametrize("rows", [7, 16, 1000])
def test_the_loss_stays_and_the_gradient_is_that_of_both_in_chunks_too(
    rows: int, example: tuple[mx.array, ...]
) -> None:
    x, head, y, excluded = example

    def both(x: mx.array, head: mx.array) -> mx.array:
        logits = x @ head.T
        return 3 * (mean_loss(logits, y) + UNLIKELIHOOD * unlikelihood(logits, excluded))

    def steered(x: mx.array, head: mx.array) -> mx.array:
        logits = x @ head.T
        return 3 * with_unlikelihood(mean_loss(logits, y), logits, excluded)

    def chunks(x: mx.array, head: mx.array) -> mx.array:
        return 3 * chunked_mean_loss(x, head, y, excluded, rows=rows)

    gradients = mx.grad(both, argnums=(0, 1))(x, head)
    runs = [mx.value_and_grad(loss, argnums=(0, 1)) for loss in (steered, chunks)]
    for run in (*runs, mx.compile(runs[1])):
        loss, found = run(x, head)
        assert loss.item() == pytest.approx(3 * mean_loss(x @ head.T, y).item(), rel=1e-6)
        for one, other in zip(found, gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_excluded_changes_nothing(example: tuple[mx.array, ...]) -> None:
    x, head, y, _ = example
    nothing = mx.full((B, T, K), -1)
    assert unlikelihood(x @ head.T, nothing).item() == 0
    assert chunked_mean_loss(x, head, y, nothing).item() == pytest.approx(chunked_mean_loss(x, head, y).item())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_model_that_is_sure_of_what_cannot_come_still_has_a_gradient(chunked: bool) -> None:
    y, excluded, head = mx.array([[1]]), mx.array([[[0]]]), mx.array([[1.0], [0.0]])

    def loss(x: mx.array) -> mx.array:
        if chunked:
            return chunked_mean_loss(x, head, y, excluded)
        return with_unlikelihood(mean_loss(x @ head.T, y), x @ head.T, excluded)

    value, gradient = mx.value_and_grad(loss)(mx.array([[[50.0]]]))
    assert np.isfinite(value.item())
    assert 1 <= gradient.item() <= 1 + 2 * UNLIKELIHOOD
