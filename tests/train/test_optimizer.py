"""The optimizers and the schedules follow their formulas; a new one is one entry in a table."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.small_training import batch, new_small, weights

from mlx_gpt.train import muon as muon_module
from mlx_gpt.train.auto.defaults import choose
from mlx_gpt.train.auto.model_size import TextSize
from mlx_gpt.train.auto.plan import settings_of
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.machine import Machine
from mlx_gpt.train.muon import StackedMuon, orthogonalize
from mlx_gpt.train.optimizer import OPTIMIZERS, OptimizerEntry, make_optimizer
from mlx_gpt.train.schedule import SCHEDULES, Schedule
from mlx_gpt.train.step import make_train_step

# The optimizer


class Two(nn.Module):
    """A matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
        self.bias = mx.array(np.random.default_rng(1).normal(size=4).astype(np.float32))


def test_weight_decay_shrinks_matrices_and_leaves_vectors_unchanged() -> None:
    model, before = Two(), weights(Two())
    optimizer = make_optimizer(TrainConfig(learning_rate=0.1, weight_decay=0.5), n_head=1)
    optimizer.init(model.trainable_parameters())
    optimizer.update(model, {"weight": mx.zeros((3, 4)), "bias": mx.zeros(4)})
    np.testing.assert_allclose(weights(model)["weight"], before["weight"] * (1 - 0.1 * 0.5), rtol=1e-6)
    assert (weights(model)["bias"] == before["bias"]).all()


def reference_adamw(w: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, b1: float, b2: float) -> Any:
    """Algorithm 2 of Loshchilov & Hutter 2019, with the decay scaled by the learning rate as PyTorch does."""
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * decay * w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return w


@pytest.mark.parametrize("n", [1, 2, 10])
def test_adamw_updates_follow_the_paper(n: int) -> None:
    rng = np.random.default_rng(2)
    gradients = [{"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)} for _ in range(n)]
    model, before = Two(), weights(Two())
    optimizer = make_optimizer(TrainConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95), n_head=1)
    optimizer.init(model.trainable_parameters())
    for gradient in gradients:
        optimizer.update(model, {name: mx.array(g.astype(np.float32)) for name, g in gradient.items()})
    for name, decay in {"weight": 0.1, "bias": 0.0}.items():
        expected = reference_adamw(before[name], [g[name] for g in gradients], 0.01, decay, 0.9, 0.95)
        np.testing.assert_allclose(weights(model)[name], expected, rtol=1e-5)


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    rng = np.random.default_rng(0)
    model = new_small()
    before = weights(model)
    heads = model.config.n_head
    config = TrainConfig(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.0)
    optimizer = make_optimizer(config, heads)
    optimizer.init(model.trainable_parameters())
    gradient = {name: rng.normal(size=w.shape).astype(np.float32) for name, w in before.items()}
    model_gradient = nn.utils.tree_unflatten([(name, mx.array(g)) for name, g in gradient.items()])
    optimizer.update(model, model_gradient)
    for name, weight in weights(model).items():
        change = weight - before[name]
        if name.startswith("h.") and weight.ndim == 2:  # all singular values are close, unlike the gradient's
            parts = np.split(change, 3 * heads) if name.endswith("attn.c_attn.weight") else [change]
            for part in parts:
                lengths = np.linalg.svd(part, compute_uv=False)
                assert lengths.max() / lengths.min() < 3
        else:  # the first update of AdamW has one size in all coordinates
            np.testing.assert_allclose(change, -0.01 * np.sign(gradient[name]), rtol=1e-2)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    lengths = u.T @ np.array(orthogonalize(mx.array(x), 5)) @ v.T
    np.testing.assert_allclose(lengths - np.diag(np.diag(lengths)), 0, atol=1e-4)
    assert np.diag(lengths).min() > 0.6
    assert np.diag(lengths).max() < 1.3


def test_muon_updates_a_head_with_a_small_gradient_as_much_as_one_with_a_large() -> None:
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(2, 4, 8))
    optimizer = StackedMuon(0.1, 2, momentum=0.95, weight_decay=0.0, ns_steps=5)
    weight = {"w": mx.zeros((8, 8))}
    optimizer.init(weight)
    gradient = np.concatenate([large, 1e-3 * small]).astype(np.float32)
    step = np.array(optimizer.apply_gradients({"w": mx.array(gradient)}, weight)["w"])
    lengths = [np.linalg.svd(part, compute_uv=False) for part in np.split(step, 2)]
    assert all(0.06 < length < 0.13 for part in lengths for length in part)


def test_muon_updates_weights_of_one_shape_in_a_batch_as_it_does_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 8), "b": (24, 8), "c": (8, 8), "d": (8, 24), "e": (24, 8)}
    before = {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}

    def updated(size: int) -> dict[str, mx.array]:
        monkeypatch.setattr(muon_module, "SMALL", size)
        optimizer, found = StackedMuon(0.1, 2, momentum=0.95, weight_decay=0.0, ns_steps=5), before
        optimizer.init(found)
        for seed in range(3):
            keys = mx.random.split(mx.random.key(seed), len(shapes))
            gradient = {
                name: mx.random.normal(w.shape, key=key) for (name, w), key in zip(found.items(), keys, strict=True)
            }
            found = optimizer.apply_gradients(gradient, found)
        return found

    separate, batched = updated(0), updated(1 << 16)
    for name in shapes:
        np.testing.assert_allclose(batched[name], separate[name], rtol=1e-4, atol=1e-5)


def test_muon_equals_mlxs_muon_on_one_matrix() -> None:
    rng = np.random.default_rng(0)
    weight = {"w": mx.array(rng.normal(size=(24, 8)).astype(np.float32))}
    settings: dict = {"momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5}
    ours, theirs = StackedMuon(0.1, 1, **settings), optim.Muon(0.1, **settings)
    one = other = weight
    for _ in range(3):
        gradient = {"w": mx.array(rng.normal(size=(24, 8)).astype(np.float32))}
        one, other = ours.apply_gradients(gradient, one), theirs.apply_gradients(gradient, other)
    np.testing.assert_allclose(one["w"], other["w"], rtol=1e-4, atol=1e-5)
    assert ours.state.keys() == theirs.state.keys()  # so their checkpoints are interchangeable


# Schedules


def factors(kind: str, warmup: float = 0.1, final: float = 0.2) -> Any:
    return Schedule(make_optimizer(TrainConfig(), 1), kind, warmup, final).factor


def test_cosine_has_a_linear_warmup_and_decays_along_half_a_cosine() -> None:
    factor = factors("cosine")
    assert [factor(done) for done in (0, 0.05, 0.1)] == pytest.approx([0, 0.5, 1])
    assert factor(0.55) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(0.325) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + cos(pi / 4)))
    assert [factor(1), factor(1.5)] == pytest.approx([0.2, 0.2])
    assert factors("cosine", warmup=0)(0) == 1


def test_wsd_stays_at_the_peak_and_decays_linearly_at_the_end() -> None:
    factor = factors("wsd")
    assert [factor(done) for done in (0.05, 0.1, 0.3, 0.6)] == pytest.approx([0.5, 1, 1, 1])
    assert [factor(done) for done in (0.8, 1, 1.5)] == pytest.approx([0.2 + 0.8 * 0.5, 0.2, 0.2])


def test_a_schedule_scales_every_learning_rate_and_returns_that_of_adamw() -> None:
    optimizer = make_optimizer(TrainConfig(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.04), 1)
    assert Schedule(optimizer, "cosine", warmup=0.5).set(0.25) == pytest.approx(0.005)
    assert [float(one.learning_rate.item()) for one in optimizer.optimizers] == pytest.approx(
        [0.02, 0.02, 0.005, 0.005]
    )


def test_a_new_learning_rate_is_seen_by_the_compiled_step() -> None:
    model = new_small()
    optimizer = make_optimizer(TrainConfig(), model.config.n_head)
    schedule = Schedule(optimizer, "cosine", warmup=0.5)
    step, state = make_train_step(model, optimizer, TrainConfig(batch_size=4))
    schedule.set(0.5)
    mx.eval(step(*batch()), state)
    before = weights(model)
    schedule.set(0.0)
    mx.eval(step(*batch()), state)
    assert all((weight == before[name]).all() for name, weight in weights(model).items())


# The tables


def test_an_optimizer_and_a_schedule_that_are_added_to_the_tables_train_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lion(config: Any, n_head: int) -> optim.Optimizer:
        return optim.Lion(config.learning_rate)

    monkeypatch.setitem(OPTIMIZERS, "lion", OptimizerEntry(lion, max_learning_rate=1e-4))
    monkeypatch.setitem(SCHEDULES, "linear", lambda done, warmup: (1 - done) / (1 - warmup))
    given = {"optimizer": "lion", "schedule": "linear"}
    choices = choose(TextSize(400_000, 45_000, 257), Machine(4e9, 6e7, 8 << 30), 60.0, given)
    config = TrainConfig.of({**settings_of(choices), **given})
    assert config.learning_rate == 1e-4  # the highest, for so short a run
    model = new_small()
    optimizer = make_optimizer(config, model.config.n_head)
    assert Schedule(optimizer, config.schedule, config.warmup, final=0.0).set(0.75) == pytest.approx(0.25e-4, rel=0.05)
    step, state = make_train_step(model, optimizer, config)
    before = weights(model)
    mx.eval(step(*batch()), state)
    changes = [np.abs(weight - before[name]).max() for name, weight in weights(model).items()]
    assert 0 < max(changes) < 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    model = new_small()
    optimizer = make_optimizer(TrainConfig(optimizer=name), model.config.n_head)
    step, state = make_train_step(model, optimizer, TrainConfig(batch_size=4))
    losses = []
    for _ in range(10):
        loss, _ = step(*batch())
        mx.eval(loss, state)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
