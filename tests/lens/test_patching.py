"""Patching and ablation change one thing and leave the rest as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import H, L, P, T, largest_difference, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import (
    ablate_heads,
    activation_patching,
    attribution_patching,
    gradients,
    head_scores,
    logit_difference,
    path_patching,
    trace,
)
from mlx_gpt.lens.components import without
from mlx_gpt.model.quantize import quantize
from mlx_gpt.train.loss import mean_loss

MODEL, CLEAN, CORRUPTED = random_model(), random_ids(0), random_ids(1)
METRIC = logit_difference([3, 4], [5, 6])
Z = "blocks.{}.attn.hook_z"


def metric_of(edits: dict[str, Callable] | None = None, tokens: mx.array = CORRUPTED) -> float:
    return METRIC(trace(MODEL, tokens, edits)[0]).item()


# Activation patching


def test_patching_a_position_is_a_run_with_that_position_replaced() -> None:
    found = activation_patching(MODEL, CLEAN, CORRUPTED, METRIC)
    assert found.shape == (L, T)
    _, clean = trace(MODEL, CLEAN)

    def edit(x: mx.array, name: str) -> mx.array:
        x[:, 4] = clean[name][:, 4]
        return x

    for layer in range(L):
        assert found[layer, 4].item() == pytest.approx(metric_of({f"blocks.{layer}.hook_resid_pre": edit}), abs=1e-5)


@pytest.mark.parametrize("name", ["attn.hook_z", "attn.hook_v", "attn.hook_pattern", "attn.hook_attn_scores"])
def test_patching_a_head_is_a_run_with_that_head_replaced(name: str) -> None:
    found = activation_patching(MODEL, CLEAN, CORRUPTED, METRIC, name, over=["head"])
    assert found.shape == (L, H)
    _, clean = trace(MODEL, CLEAN)
    at = (slice(None), 2) if "hook_pattern" in name or "scores" in name else (slice(None), slice(None), 2)

    def edit(x: mx.array, name: str) -> mx.array:
        x[at] = clean[name][at]
        return x

    for layer in range(L):
        assert found[layer, 2].item() == pytest.approx(metric_of({f"blocks.{layer}.{name}": edit}), abs=1e-5)


def test_heads_and_positions_may_be_patched_in_either_order() -> None:
    short, other = CLEAN[:, :4], CORRUPTED[:, :4]
    both = activation_patching(MODEL, short, other, METRIC, "attn.hook_z", ("head", "position"))
    swapped = activation_patching(MODEL, short, other, METRIC, "attn.hook_z", ("position", "head"))
    assert both.shape == (L, H, 4)
    assert largest_difference(both, swapped.swapaxes(1, 2)) < 1e-5
    estimate = attribution_patching(MODEL, short, other, METRIC, "attn.hook_z", ("head", "position"))
    swapped = attribution_patching(MODEL, short, other, METRIC, "attn.hook_z", ("position", "head"))
    assert largest_difference(estimate, swapped.swapaxes(1, 2)) < 1e-5
    by_query = activation_patching(MODEL, short, other, METRIC, "attn.hook_pattern", ("head", "position"))
    assert by_query.shape == (L, H, 4)


def test_patching_all_layers_inputs_at_the_last_position_of_the_last_layer_gives_the_clean_metric() -> None:
    only_last = mx.concatenate([CLEAN[:, :-1], CORRUPTED[:, -1:]], axis=1)
    found = activation_patching(MODEL, CLEAN, only_last, METRIC)
    assert found[:, -1].tolist() == pytest.approx([metric_of(tokens=CLEAN)] * L, abs=1e-5)
    assert found[:, :-1].tolist() == pytest.approx(np.full((L, T - 1), metric_of(tokens=only_last)), abs=1e-5)


def test_a_quantized_model_may_be_patched() -> None:
    model = quantize(random_model(n_embd=64, n_layer=1), 8)
    found = activation_patching(model, CLEAN, CORRUPTED, METRIC)
    assert found[0, -1].item() != pytest.approx(METRIC(model(CORRUPTED)).item(), abs=1e-4)


# Attribution patching


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("hook_resid_pre", "position"),
        ("hook_mlp_out", "position"),
        ("attn.hook_z", "head"),
        ("attn.hook_attn_scores", "head"),
    ],
)
def test_attribution_patching_is_activation_patching_for_a_small_difference(name: str, over: str) -> None:
    model = random_model(tie_word_embeddings=False)
    step = 0.01 * mx.random.normal(model.wte.weight[0].shape, key=mx.random.key(3))
    model.wte.weight[0] = model.wte.weight[1] + step
    corrupted = random_ids(1)
    corrupted[:, 2:5] = 1
    clean = mx.array(corrupted)
    clean[:, 2:5] = 0
    exact = activation_patching(model, clean, corrupted, METRIC, name, (over,)) - METRIC(model(corrupted))
    estimate = attribution_patching(model, clean, corrupted, METRIC, name, (over,))
    assert largest_difference(exact, estimate) < 0.05 * mx.abs(estimate).max().item()
    assert mx.abs(estimate).max().item() > 1e-3


def test_the_gradient_is_exact_where_the_rest_is_linear() -> None:
    # The final norm is the only nonlinear part after the last MLP: with its scale held, the metric is linear.
    _, frozen = trace(MODEL, CORRUPTED, names="ln_final.hook_scale")
    _, clean = trace(MODEL, CLEAN, names="blocks.2.hook_mlp_out")
    hold = {"ln_final.hook_scale": lambda x, name: frozen[name]}
    name = "blocks.2.hook_mlp_out"
    value, grads = gradients(MODEL, CORRUPTED, METRIC, name, hold)
    _, base = trace(MODEL, CORRUPTED, names=name)
    estimate = ((clean[name] - base[name]) * grads[name]).sum().item()
    patched, _ = trace(MODEL, CORRUPTED, {name: lambda x, name: clean[name], **hold})
    assert METRIC(patched).item() - value.item() == pytest.approx(estimate, abs=1e-5)


def test_attribution_patching_has_the_shape_of_activation_patching() -> None:
    assert attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC).shape == (L, T)
    assert attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, "attn.hook_z", ["head"]).shape == (L, H)
    assert attribution_patching(MODEL, CLEAN, CORRUPTED, METRIC, "attn.hook_pattern", ["head"]).shape == (L, H)


# Path patching


def test_a_path_to_the_logits_is_the_direct_effect() -> None:
    found = path_patching(MODEL, CORRUPTED, CLEAN, (Z.format(0), 2), ("hook_unembed", None), METRIC)
    _, base = trace(MODEL, CORRUPTED, names=["*", "*hook_result"])
    _, clean = trace(MODEL, CLEAN, names="*hook_result")
    name = "blocks.0.attn.hook_result"
    stream = base[f"blocks.{L - 1}.hook_resid_post"] + clean[name][:, :, 2] - base[name][:, :, 2]
    assert found.item() == pytest.approx(METRIC(MODEL.logits(MODEL.ln_f(stream))).item(), abs=1e-5)


def test_a_path_into_a_query_changes_that_query_only() -> None:
    found = path_patching(MODEL, CORRUPTED, CLEAN, (Z.format(0), 2), ("blocks.2.attn.hook_q", 1), METRIC)
    _, base = trace(MODEL, CORRUPTED, names=["*", "*hook_result"])
    _, clean = trace(MODEL, CLEAN, names="*hook_result")
    name = "blocks.0.attn.hook_result"
    stream = base["blocks.2.hook_resid_pre"] + clean[name][:, :, 2] - base[name][:, :, 2]
    query = MODEL.h[2].attn.head(1).query(MODEL.h[2].ln_1(stream))

    def edit(q: mx.array, name: str) -> mx.array:
        q[:, :, 1] = query
        return q

    assert found.item() == pytest.approx(metric_of({"blocks.2.attn.hook_q": edit}), abs=1e-5)
    assert found.item() != pytest.approx(metric_of(), abs=1e-5)


def test_paths_through_mlps_are_counted_on_request() -> None:
    sender, receiver = ("blocks.0.hook_mlp_out", None), ("blocks.2.mlp.hook_pre", None)
    direct = path_patching(MODEL, CORRUPTED, CLEAN, sender, receiver, METRIC)
    through = path_patching(MODEL, CORRUPTED, CLEAN, sender, receiver, METRIC, through_mlps=True)
    assert direct.item() != pytest.approx(through.item(), abs=1e-4)
    _, base = trace(MODEL, CORRUPTED)
    _, clean = trace(MODEL, CLEAN)
    delta = clean["blocks.0.hook_mlp_out"] - base["blocks.0.hook_mlp_out"]
    middle = base["blocks.1.hook_resid_mid"] + delta
    moved = middle + MODEL.h[1].mlp(MODEL.h[1].ln_2(middle)) + base["blocks.2.hook_attn_out"]
    pre = MODEL.h[2].mlp.c_fc(MODEL.h[2].ln_2(moved))
    expected = metric_of({"blocks.2.mlp.hook_pre": lambda x, name: pre})
    assert through.item() == pytest.approx(expected, abs=1e-5)


def test_there_is_no_path_backwards_and_none_from_equal_texts() -> None:
    forward = ((Z.format(0), 1), ("blocks.1.attn.hook_k", 0))
    backward = ((Z.format(2), 1), ("blocks.1.attn.hook_k", 0))
    assert path_patching(MODEL, CORRUPTED, CLEAN, *backward, METRIC).item() == pytest.approx(metric_of(), abs=1e-5)
    assert path_patching(MODEL, CLEAN, CLEAN, *forward, METRIC).item() == pytest.approx(
        metric_of(tokens=CLEAN), abs=1e-5
    )
    assert path_patching(MODEL, CORRUPTED, CLEAN, *forward, METRIC).item() != pytest.approx(metric_of(), abs=1e-5)


# Ablation


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_ablation_is_the_loss_without_a_head_minus_the_loss(mode: str) -> None:
    found = ablate_heads(MODEL, CLEAN, mode)
    assert found.shape == (L, H)

    def edit(z: mx.array, name: str) -> mx.array:
        other = {"zero": z * 0, "mean": mx.broadcast_to(z.mean(axis=(0, 1)), z.shape), "resample": z[::-1]}[mode]
        z[:, :, 3] = other[:, :, 3]
        return z

    for layer in range(L):
        ablated = trace(MODEL, CLEAN, {Z.format(layer): edit})[0]
        loss, before = (mean_loss(logits[:, :-1], CLEAN[:, 1:]) for logits in (ablated, MODEL(CLEAN)))
        assert found[layer, 3].item() == pytest.approx((loss - before).item(), abs=1e-5)


def test_a_reference_text_supplies_means_and_samples() -> None:
    assert not mx.allclose(ablate_heads(MODEL, CLEAN, "mean", CORRUPTED), ablate_heads(MODEL, CLEAN, "mean"))
    assert not mx.allclose(ablate_heads(MODEL, CLEAN, "resample", CORRUPTED), ablate_heads(MODEL, CLEAN, "resample"))
    longer = random_ids(2, (3, P))
    assert ablate_heads(MODEL, CLEAN, "mean", longer).shape == (L, H)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activation_patching(MODEL, CLEAN, CLEAN[:, :-1], METRIC), r"shapes \(2, 9\) and \(2, 8\)"),
        (lambda: activation_patching(MODEL, CLEAN, CORRUPTED, METRIC, "hook_q"), "no activation is named"),
        (
            lambda: activation_patching(MODEL, CLEAN, CORRUPTED, METRIC, over=["head"]),
            "patched over position, not 'head'",
        ),
        (lambda: ablate_heads(MODEL, CLEAN, "delete"), "by zero, mean or resample, not 'delete'"),
        (lambda: ablate_heads(MODEL, CLEAN[:1], "resample"), "at least two rows"),
        (lambda: ablate_heads(MODEL, CLEAN, "resample", CLEAN[:, :3]), "of the text's shape"),
        (lambda: ablate_heads(MODEL, CLEAN[:, :1]), "at least 2 tokens"),
        (lambda: paths((Z.format(0), None), ("hook_unembed", None)), "has heads; give a head"),
        (lambda: paths((Z.format(0), H), ("hook_unembed", None)), f"head must be between 0 and {H - 1}"),
        (lambda: paths((Z.format(0), 0), ("hook_unembed", 1)), "has no heads; give None"),
    ],
)
def test_what_cannot_be_patched_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def paths(sender: tuple[str, int | None], receiver: tuple[str, int | None]) -> mx.array:
    return path_patching(MODEL, CLEAN, CORRUPTED, sender, receiver, METRIC)


def test_texts_of_one_row_are_patched_too() -> None:
    assert activation_patching(MODEL, CLEAN[:1], CORRUPTED[:1], logit_difference(3, 5)).shape == (L, T)


# Under edits


@pytest.mark.parametrize(
    "read",
    [
        lambda model, edits: mx.stack([*head_scores(model, P // 2, edits=edits).values()]),
        lambda model, edits: ablate_heads(model, CLEAN, "mean", CORRUPTED, edits=edits),
        lambda model, edits: activation_patching(model, CLEAN, CORRUPTED, METRIC, edits=edits),
        lambda model, edits: activation_patching(model, CLEAN, CORRUPTED, METRIC, "attn.hook_z", ["head"], edits),
        lambda model, edits: attribution_patching(model, CLEAN, CORRUPTED, METRIC, edits=edits),
        lambda model, edits: path_patching(
            model, CLEAN, CORRUPTED, ("blocks.0.attn.hook_z", 1), ("blocks.2.attn.hook_q", 3), METRIC, edits=edits
        ),
    ],
    ids=["head scores", "ablation", "patching", "patching of heads", "attribution patching", "path"],
)
def test_readings_without_parts_are_those_of_a_model_whose_parts_write_nothing(read: Callable) -> None:
    other = random_model()
    D = other.config.n_embd // H
    other.h[0].attn.c_proj.weight[:, 2 * D : 3 * D] = 0
    other.h[1].mlp.c_proj.weight, other.h[1].mlp.c_proj.bias = (
        mx.zeros_like(other.h[1].mlp.c_proj[name]) for name in ("weight", "bias")
    )
    found = read(MODEL, without(MODEL, ["L0H2", "L1MLP"]))
    assert largest_difference(found, read(other, None)) < 1e-5
    assert largest_difference(found, read(MODEL, None)) > 1e-4
