"""Gradients with respect to activations equal finite differences."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, largest_difference, random_ids, random_model

from mlx_gpt.lens import activation_names, gradients, logit_difference, trace
from mlx_gpt.model.quantize import quantize

MODEL, TOKENS = random_model(n_layer=2), random_ids()
METRIC = logit_difference([3, 4], [5, 6])
RESULTS = ["blocks.0.attn.hook_result", "blocks.1.attn.hook_result"]


def along(model: Any, name: str, direction: mx.array, step: float, edits: dict | None = None) -> float:
    def shift(x: mx.array, name: str) -> mx.array:
        return mx.where(mx.isinf(x), x, x + step * direction)

    return METRIC(trace(model, TOKENS, {**(edits or {}), name: shift})[0]).item()


def slope(model: Any, name: str, direction: mx.array, edits: dict | None = None) -> float:
    """Return the central difference, by Richardson's extrapolation of two steps."""
    coarse, fine = (
        (along(model, name, direction, h, edits) - along(model, name, direction, -h, edits)) / (2 * h)
        for h in (0.02, 0.01)
    )
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("name", [*activation_names(MODEL.config), *RESULTS])
def test_gradients_equal_finite_differences(name: str) -> None:
    value, grads = gradients(MODEL, TOKENS, METRIC, name)
    _, activations = trace(MODEL, TOKENS, names=name)
    grad, x = grads[name], activations[name]
    assert grad.shape == x.shape
    assert value.item() == pytest.approx(METRIC(MODEL(TOKENS)).item(), abs=1e-5)
    assert mx.abs(mx.where(mx.isinf(x), grad, 0)).max().item() == 0  # masked scores
    direction = mx.random.normal(x.shape, key=mx.random.key(1)) + mx.sign(grad)
    direction = direction / mx.sqrt(mx.square(direction).sum())
    expected = slope(MODEL, name, direction)
    assert (mx.where(mx.isinf(x), 0, direction) * grad).sum().item() == pytest.approx(expected, rel=2e-2, abs=1e-3)
    assert abs(expected) > 1e-4


def test_gradients_are_those_after_the_edits() -> None:
    name = "blocks.0.hook_resid_post"
    edits = {name: lambda x, name: x * 2, "blocks.1.attn.hook_z": lambda x, name: x * 0.5}
    value, grads = gradients(MODEL, TOKENS, METRIC, name, edits)
    logits, _ = trace(MODEL, TOKENS, edits)
    assert value.item() == pytest.approx(METRIC(logits).item(), abs=1e-5)
    _, plain = gradients(MODEL, TOKENS, METRIC, name)
    assert largest_difference(grads[name], plain[name]) > 1e-3
    # Adding to the edited activation is adding half to the one before it is doubled.
    direction = mx.random.normal(grads[name].shape, key=mx.random.key(2)) / 20
    before = {"blocks.0.hook_mlp_out": lambda x, name: x + 0.01 * direction / 2} | edits
    less = {"blocks.0.hook_mlp_out": lambda x, name: x - 0.01 * direction / 2} | edits
    found = (METRIC(trace(MODEL, TOKENS, before)[0]) - METRIC(trace(MODEL, TOKENS, less)[0])).item() / 0.02
    assert (direction * grads[name]).sum().item() == pytest.approx(found, rel=5e-2, abs=1e-3)


def test_gradients_of_many_names_at_once_are_those_of_each() -> None:
    names = ["blocks.*.attn.hook_pattern", "hook_embed", "blocks.1.hook_in"]
    _, together = gradients(MODEL, TOKENS, METRIC, names)
    assert len(together) == 4
    for name in together:
        assert largest_difference(together[name], gradients(MODEL, TOKENS, METRIC, name)[1][name]) < 1e-5


def test_an_edit_of_ones_own_gives_the_same_gradient() -> None:
    name = "blocks.1.attn.hook_z"

    def metric(zero: mx.array) -> mx.array:
        return METRIC(trace(MODEL, TOKENS, {name: lambda x, name: x + zero})[0])

    _, activations = trace(MODEL, TOKENS, names=name)
    by_hand = mx.grad(metric)(mx.zeros_like(activations[name]))
    assert largest_difference(by_hand, gradients(MODEL, TOKENS, METRIC, name)[1][name]) < 1e-6


def test_gradients_compile() -> None:
    edits = {"blocks.0.attn.hook_z": lambda x, name: x * 0.5}
    compiled = mx.compile(lambda tokens: gradients(MODEL, tokens, METRIC, "hook_embed", edits))
    (value, grads), (plain, expected) = compiled(TOKENS), gradients(MODEL, TOKENS, METRIC, "hook_embed", edits)
    assert value.item() == pytest.approx(plain.item(), abs=1e-5)
    assert largest_difference(grads["hook_embed"], expected["hook_embed"]) < 1e-5


def test_quantized_models_have_gradients() -> None:
    model = quantize(random_model(n_embd=64, n_layer=1), 8)
    _, grads = gradients(model, TOKENS, METRIC, "hook_embed")
    direction = mx.sign(grads["hook_embed"]) / 30
    expected = slope(model, "hook_embed", direction)
    assert (direction * grads["hook_embed"]).sum().item() == pytest.approx(expected, rel=2e-2)


def test_the_logit_difference_is_the_mean_over_rows() -> None:
    logits = np.array(MODEL(TOKENS))
    each = [logits[0, -1, 3] - logits[0, -1, 5], logits[1, -1, 4] - logits[1, -1, 6]]
    assert METRIC(mx.array(logits)).item() == pytest.approx(np.mean(each), abs=1e-5)
    same = logit_difference(3, 5, position=2)(mx.array(logits)).item()
    assert same == pytest.approx((logits[:, 2, 3] - logits[:, 2, 5]).sum() / B, abs=1e-5)
