"""The optimizers and the schedule are what the formulas say."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.small_training import batch, new_small, weights

from mlx_gpt.train import optimizer as optimizer_module
from mlx_gpt.train.optimizer import Schedule, StackedMuon, make_optimizer, orthogonalized
from mlx_gpt.train.step import make_train_step

# The optimizer


class Two(nn.Module):
    """A matrix and a bias, which is all that matters to an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
        self.bias = mx.array(np.random.default_rng(1).normal(size=4).astype(np.float32))


def test_decay_shrinks_matrices_and_leaves_vectors_as_they_were() -> None:
    model, before = Two(), weights(Two())
    optimizer = make_optimizer(learning_rate=0.1, weight_decay=0.5)
    optimizer.init(model.trainable_parameters())
    optimizer.update(model, {"weight": mx.zeros((3, 4)), "bias": mx.zeros(4)})
    np.testing.assert_allclose(weights(model)["weight"], before["weight"] * (1 - 0.1 * 0.5), rtol=1e-6)
    assert (weights(model)["bias"] == before["bias"]).all()


def adamw_by_hand(w: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, b1: float, b2: float) -> Any:
    """Algorithm 2 of Loshchilov & Hutter 2019, with the decay scaled by the learning rate as PyTorch does."""
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * decay * w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return w


@pytest.mark.parametrize("n", [1, 2, 10])
def test_steps_of_adamw_are_those_of_the_paper(n: int) -> None:
    rng = np.random.default_rng(2)
    gradients = [{"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)} for _ in range(n)]
    model, before = Two(), weights(Two())
    optimizer = make_optimizer(learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer.init(model.trainable_parameters())
    for gradient in gradients:
        optimizer.update(model, {name: mx.array(g.astype(np.float32)) for name, g in gradient.items()})
    for name, decay in {"weight": 0.1, "bias": 0.0}.items():
        by_hand = adamw_by_hand(before[name], [g[name] for g in gradients], 0.01, decay, 0.9, 0.95)
        np.testing.assert_allclose(weights(model)[name], by_hand, rtol=1e-5)


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    rng = np.random.default_rng(0)
    model = new_small()
    before = weights(model)
    heads = model.config.n_head
    optimizer = make_optimizer("muon", learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.0, n_head=heads)
    optimizer.init(model.trainable_parameters())
    gradient = {name: rng.normal(size=w.shape).astype(np.float32) for name, w in before.items()}
    model_gradient = nn.utils.tree_unflatten([(name, mx.array(g)) for name, g in gradient.items()])
    optimizer.update(model, model_gradient)
    for name, weight in weights(model).items():
        change = weight - before[name]
        if name.startswith("h.") and weight.ndim == 2:  # singular values all near one length: not the gradient's own
            parts = np.split(change, 3 * heads) if name.endswith("attn.c_attn.weight") else [change]
            for part in parts:
                lengths = np.linalg.svd(part, compute_uv=False)
                assert lengths.max() / lengths.min() < 3
        else:  # AdamW's first step goes the same way along every coordinate
            np.testing.assert_allclose(change, -0.01 * np.sign(gradient[name]), rtol=1e-2)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalizing_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    lengths = u.T @ np.array(orthogonalized(mx.array(x), 5)) @ v.T
    np.testing.assert_allclose(lengths - np.diag(np.diag(lengths)), 0, atol=1e-4)
    assert np.diag(lengths).min() > 0.6
    assert np.diag(lengths).max() < 1.3


def test_a_small_gradient_moves_its_head_as_far_as_a_large_one() -> None:
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(2, 4, 8))
    optimizer = StackedMuon(0.1, 2, momentum=0.95, weight_decay=0.0, ns_steps=5)
    weight = {"w": mx.zeros((8, 8))}
    optimizer.init(weight)
    gradient = np.concatenate([large, 1e-3 * small]).astype(np.float32)
    step = np.array(optimizer.apply_gradients({"w": mx.array(gradient)}, weight)["w"])
    lengths = [np.linalg.svd(part, compute_uv=False) for part in np.split(step, 2)]
    assert all(0.06 < length < 0.13 for part in lengths for length in part)


def test_weights_of_one_shape_move_as_each_would_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 8), "b": (24, 8), "c": (8, 8), "d": (8, 24), "e": (24, 8)}
    before = {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}

    def moved(size: int) -> dict[str, mx.array]:
        monkeypatch.setattr(optimizer_module, "SMALL", size)
        optimizer, found = StackedMuon(0.1, 2, momentum=0.95, weight_decay=0.0, ns_steps=5), before
        optimizer.init(found)
        for seed in range(3):
            keys = mx.random.split(mx.random.key(seed), len(shapes))
            gradient = {
                name: mx.random.normal(w.shape, key=key) for (name, w), key in zip(found.items(), keys, strict=True)
            }
            found = optimizer.apply_gradients(gradient, found)
        return found

    alone, together = moved(0), moved(1 << 16)
    for name in shapes:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4, atol=1e-5)


def test_one_matrix_moves_as_with_mlxs_muon() -> None:
    rng = np.random.default_rng(0)
    weight = {"w": mx.array(rng.normal(size=(24, 8)).astype(np.float32))}
    settings: dict = {"momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5}
    ours, theirs = StackedMuon(0.1, 1, **settings), optim.Muon(0.1, **settings)
    one = other = weight
    for _ in range(3):
        gradient = {"w": mx.array(rng.normal(size=(24, 8)).astype(np.float32))}
        one, other = ours.apply_gradients(gradient, one), theirs.apply_gradients(gradient, other)
    np.testing.assert_allclose(one["w"], other["w"], rtol=1e-4, atol=1e-5)
    assert ours.state.keys() == theirs.state.keys()  # a checkpoint of one is one of the other


# The schedule


def factors(kind: str, warmup: float = 0.1, final: float = 0.2) -> Any:
    return Schedule(make_optimizer(learning_rate=0.5), kind, warmup, final).factor


def test_the_cosine_rises_in_a_line_and_falls_in_half_a_wave() -> None:
    factor = factors("cosine")
    assert [factor(done) for done in (0, 0.05, 0.1)] == pytest.approx([0, 0.5, 1])
    assert factor(0.55) == pytest.approx(0.2 + 0.8 * 0.5)  # halfway down
    assert factor(0.325) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + cos(pi / 4)))
    assert [factor(1), factor(1.5)] == pytest.approx([0.2, 0.2])
    assert factors("cosine", warmup=0)(0) == 1


def test_wsd_stays_at_the_peak_and_falls_in_a_line_at_the_end() -> None:
    factor = factors("wsd")
    assert [factor(done) for done in (0.05, 0.1, 0.3, 0.6)] == pytest.approx([0.5, 1, 1, 1])
    assert [factor(done) for done in (0.8, 1, 1.5)] == pytest.approx([0.2 + 0.8 * 0.5, 0.2, 0.2])


def test_the_schedule_scales_every_learning_rate_and_tells_adamws() -> None:
    optimizer = make_optimizer("muon", learning_rate=0.01, muon_learning_rate=0.04)
    assert Schedule(optimizer, "cosine", warmup=0.5).set(0.25) == pytest.approx(0.005)
    assert [float(one.learning_rate.item()) for one in optimizer.optimizers] == pytest.approx(
        [0.02, 0.02, 0.005, 0.005]
    )


def test_a_new_learning_rate_is_seen_by_the_compiled_step() -> None:
    model = new_small()
    optimizer = make_optimizer()
    schedule = Schedule(optimizer, "cosine", warmup=0.5)
    step = make_train_step(model, optimizer, clip=1.0, batch_size=4)
    schedule.set(0.5)
    mx.eval(step(*batch()), step.state)
    before = weights(model)
    schedule.set(0.0)
    mx.eval(step(*batch()), step.state)
    assert all((weight == before[name]).all() for name, weight in weights(model).items())
