"""Edits replace activations for the rest of the model and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, H, L, T, largest_difference, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import activation_names, trace
from mlx_gpt.model.attention import attention_scores
from mlx_gpt.model.quantize import quantize

MODEL, TOKENS = random_model(), random_ids()
LOGITS, PLAIN = trace(MODEL, TOKENS)
mx.eval(LOGITS, PLAIN)


def without_head(head: int) -> Callable:
    return lambda z, name: z * (mx.arange(H) != head)[:, None]


def test_an_ablated_head_is_a_head_whose_output_weights_are_zero() -> None:
    logits, _ = trace(MODEL, TOKENS, {"blocks.1.attn.hook_z": without_head(2)})
    cut = random_model()
    weight = cut.h[1].attn.c_proj.weight
    D = weight.shape[1] // H
    weight[:, 2 * D : 3 * D] = 0
    assert largest_difference(logits, cut(TOKENS)) < 1e-5
    assert largest_difference(logits, LOGITS) > 0.01


def test_every_activation_matters_to_the_logits() -> None:
    def weigh(x: mx.array, name: str) -> mx.array:
        return mx.where(mx.isinf(x), x, x * (0.5 + 0.1 * mx.arange(x.shape[-1])))

    for name in activation_names(MODEL.config):
        logits, _ = trace(MODEL, TOKENS, {name: weigh})
        assert largest_difference(logits, LOGITS) > 1e-3, name


@pytest.mark.parametrize("kind", ["float32", "float16", "8 bits", "4 bits"])
def test_patching_everything_at_one_place_gives_the_other_text(kind: str) -> None:
    model, other = random_model(n_embd=64), random_ids(1)
    if kind == "float16":
        model.set_dtype(mx.float16)
    elif kind != "float32":
        model = quantize(model, int(kind[0]))
    expected, source = trace(model, other)
    assert largest_difference(expected, trace(model, TOKENS)[0]) > 0.1
    for name in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid", "ln_final.hook_normalized"):
        logits, _ = trace(model, TOKENS, {name: lambda x, name: source[name]})
        assert largest_difference(logits, expected) < 1e-5


def test_edited_scores_may_see_the_future() -> None:
    def unmasked(scores: mx.array, name: str) -> mx.array:
        q, k = (PLAIN[f"blocks.0.attn.hook_{letter}"].swapaxes(1, 2) for letter in "qk")
        return attention_scores(q, k, MODEL.h[0].attn.scale)

    _, found = trace(MODEL, TOKENS, {"blocks.0.attn.hook_attn_scores": unmasked})
    assert (found["blocks.0.attn.hook_pattern"] > 0).all()


def test_the_edited_value_is_what_is_stored_and_what_the_rest_computes_with() -> None:
    edits = {"blocks.0.attn.hook_pattern": lambda x, name: x * 0}
    _, found = trace(MODEL, TOKENS, edits)
    assert mx.abs(found["blocks.0.attn.hook_pattern"]).max().item() == 0
    assert mx.abs(found["blocks.0.attn.hook_z"]).max().item() == 0
    assert mx.array_equal(found["blocks.0.attn.hook_attn_scores"], PLAIN["blocks.0.attn.hook_attn_scores"])


def test_an_edit_in_place_changes_no_other_activation() -> None:
    seen = []

    def in_place(x: mx.array, name: str) -> mx.array:
        x[:] = 0
        seen.append(x)
        return x

    _, found = trace(MODEL, TOKENS, {"blocks.1.hook_resid_pre": in_place})
    assert mx.array_equal(found["blocks.0.hook_resid_post"], PLAIN["blocks.0.hook_resid_post"])
    assert mx.abs(found["blocks.1.hook_resid_pre"]).max().item() == 0
    seen[0][:] = 1  # later, by its owner
    assert mx.abs(found["blocks.1.hook_resid_pre"]).max().item() == 0


def test_activations_of_a_trace_stay_as_they_are() -> None:
    before = {name: np.array(x) for name, x in PLAIN.items()}

    def patch_and_change(x: mx.array, name: str) -> mx.array:
        y = PLAIN[name]
        x = x * y
        x[:, 0] = 5
        return x

    trace(MODEL, TOKENS, {"blocks.*.attn.hook_z": patch_and_change})
    assert all(np.array_equal(before[name], PLAIN[name], equal_nan=True) for name in PLAIN)
    _, found = trace(MODEL, TOKENS)
    found["blocks.0.hook_resid_post"][:] = 0  # by its owner
    assert mx.array_equal(found["blocks.1.hook_resid_pre"], PLAIN["blocks.1.hook_resid_pre"])


def test_a_pattern_edits_all_that_it_matches_and_names_each() -> None:
    seen = []

    def note(x: mx.array, name: str) -> mx.array:
        seen.append(name)
        return x

    edits = {"blocks.*.mlp.hook_post": note, "blocks.1.mlp.out.hook_in": note, "blocks.2.attn.hook_result": note}
    logits, _ = trace(MODEL, TOKENS, edits)
    names = [f"blocks.{l}.mlp.hook_post" for l in range(L)]
    assert seen == [names[0], names[1], "blocks.1.mlp.out.hook_in", "blocks.2.attn.hook_result", names[2]]
    assert largest_difference(logits, LOGITS) < 1e-5


def test_several_edits_of_a_name_are_applied_in_their_order() -> None:
    add, double = (lambda x, name: x + 1), (lambda x, name: x * 2)
    name = "blocks.1.hook_resid_post"
    _, found = trace(MODEL, TOKENS, {"blocks.1.hook_out": add, "blocks.*.hook_resid_post": double}, name)
    _, base = trace(MODEL, TOKENS, {"blocks.0.hook_resid_post": double}, name)
    assert largest_difference(found[name], (base[name] + 1) * 2) < 1e-4


def test_an_edit_keeps_the_type_of_the_weights() -> None:
    model = random_model(n_layer=1)
    model.set_dtype(mx.float16)
    direction = mx.ones((B, T, model.config.n_embd))  # float32
    logits, _ = trace(model, TOKENS, {"blocks.0.hook_resid_post": lambda x, name: x + direction})
    assert logits.dtype == mx.float16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (1.0, "must be a function of an activation and its name, not 1.0"),
        (lambda x, name: None, "must return an array, not NoneType"),
        (lambda x, name: 0.0, "must return an array, not float"),
        (lambda x, name: x[:, :1], r"must return the shape \(2, 9, 32\), not \(2, 1, 32\)"),
        (lambda x, name: x.swapaxes(0, 1), r"must return the shape \(2, 9, 32\), not \(9, 2, 32\)"),
        (lambda x, name: x / 0 * 0, "returns NaN"),
        (lambda x, name: np.full(x.shape, np.nan), "returns NaN"),
    ],
)
def test_an_edit_that_returns_something_else_is_refused(edit: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"the edit of blocks.0.hook_mlp_out {message}"):
        trace(MODEL, TOKENS, {"blocks.0.hook_mlp_out": edit})


def test_scores_that_leave_a_query_no_key_are_refused() -> None:
    with pytest.raises(UsageError, match="masks all keys of a query"):
        trace(MODEL, TOKENS, {"blocks.0.attn.hook_attn_scores": lambda x, name: mx.full(x.shape, -mx.inf)})
