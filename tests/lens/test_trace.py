"""The trace computes the model's logits; its activations have TransformerLens's names, shapes and values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, C, D, H, L, P, T, V, largest_difference, random_ids, random_model

from mlx_gpt.check import reference
from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.config import ACTIVATIONS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.lens import activation_names, trace
from mlx_gpt.lens.names import ALIASES, BY_NAME
from mlx_gpt.model.quantize import quantize
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    *({"activation_function": name} for name in ACTIVATIONS[1:]),
    {"n_inner": 24},
    {"layer_norm_epsilon": 0.1},
    {"n_layer": 1, "n_head": 1},
]


# The logits


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: str(fields)[1:-1] or "gpt2")
@pytest.mark.parametrize("shape", [(B, T), (1, 1), (3, P)])
def test_the_logits_are_those_of_the_fast_model(fields: dict[str, Any], shape: tuple[int, int]) -> None:
    model, tokens = random_model(**fields), random_ids(shape=shape)
    logits, _ = trace(model, tokens)
    assert largest_difference(logits, model(tokens)) < 1e-5
    by_head, _ = trace(model, tokens, names="blocks.*.attn.hook_result")  # heads added one by one
    assert largest_difference(by_head, model(tokens)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 4e-3), (mx.bfloat16, 2e-2)])
def test_half_precision_stays_half_precision(dtype: mx.Dtype, tolerance: float) -> None:
    model, tokens = random_model(n_layer=1), random_ids()
    model.set_dtype(dtype)
    logits, activations = trace(model, tokens)
    assert logits.dtype == dtype
    assert largest_difference(logits, model(tokens)) < tolerance * mx.abs(logits).max().item()
    float32 = {name for name, x in activations.items() if x.dtype == mx.float32}
    assert float32 == {name for name in activations if name.endswith(("hook_scale", "hook_normalized"))}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_is_traced_with_every_activation(bits: int, tied: bool) -> None:
    model = quantize(random_model(n_embd=64, tie_word_embeddings=tied), bits)
    tokens = random_ids()
    logits, activations = trace(model, tokens, names=["*", "blocks.*.attn.hook_result"])
    assert largest_difference(logits, model(tokens)) < 1e-4
    assert len(activations) == len(activation_names(model.config)) + L


def test_dropout_is_off_even_in_training() -> None:
    model = random_model(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    tokens = random_ids()
    expected = model.eval()(tokens)
    assert largest_difference(trace(model.train(), tokens)[0], expected) < 1e-5


def test_a_row_of_a_batch_is_the_same_alone() -> None:
    model, tokens = random_model(), random_ids()
    logits, activations = trace(model, tokens)
    for row in range(B):
        alone, of_row = trace(model, tokens[row : row + 1])
        assert largest_difference(alone, logits[row : row + 1]) < 1e-5
        for name, x in of_row.items():
            exact = np.array(activations[name][row : row + 1])
            np.testing.assert_allclose(np.array(x), exact, rtol=0, atol=1e-5, err_msg=name)


def test_it_compiles() -> None:
    model, tokens = random_model(), random_ids()
    names = ["blocks.1.attn.hook_pattern", "blocks.2.hook_in"]
    edits = {"blocks.0.mlp.hook_post": lambda x, name: x * 0.5}
    compiled = mx.compile(lambda tokens: trace(model, tokens, edits, names))
    logits, activations = compiled(tokens)
    plain_logits, plain = trace(model, tokens, edits, names)
    assert largest_difference(logits, plain_logits) < 1e-5
    assert {name: largest_difference(activations[name], plain[name]) < 1e-5 for name in names} == dict.fromkeys(
        names, True
    )


# The activations


def test_gpt2_small_has_208_activations_in_the_order_of_computation() -> None:
    names = activation_names(GPTConfig())
    assert len(names) == len(set(names)) == 208
    model = random_model()
    assert list(trace(model, random_ids())[1]) == activation_names(model.config)


def test_each_has_the_shape_that_transformerlens_states() -> None:
    stated = {
        r"hook_(embed|pos_embed)": (B, T, C),
        r"blocks.\d.hook_(resid_pre|attn_out|resid_mid|mlp_out|resid_post)": (B, T, C),
        r"(blocks.\d.ln[12]|ln_final).hook_scale": (B, T, 1),
        r"(blocks.\d.ln[12]|ln_final).hook_(normalized|out)": (B, T, C),
        r"blocks.\d.attn.hook_[qkvz]": (B, T, H, D),
        r"blocks.\d.attn.[qkv].hook_in": (B, T, C),
        r"blocks.\d.attn.hook_(attn_scores|pattern)": (B, H, T, T),
        r"blocks.\d.attn.hook_result": (B, T, H, C),
        r"blocks.\d.mlp.hook_(pre|post)": (B, T, 4 * C),
        r"hook_unembed": (B, T, V),
    }
    _, activations = trace(random_model(), random_ids(), names=["*", *(name.replace("{l}", "*") for name in BY_NAME)])
    assert len(activations) == 17 * L + 4 + 6 * L + 2
    for name, x in activations.items():
        (shape,) = [shape for pattern, shape in stated.items() if re.fullmatch(pattern, name)]
        assert x.shape == shape, name


def test_the_activations_equal_float64(tmp_path: Path) -> None:
    model = random_model(vocab_size=257)
    save(model, Tokenizer.bytes(), tmp_path / "model")
    weights, tokens = HubFolder(tmp_path / "model"), random_ids(shape=(1, T))
    _, found = trace(model, tokens, names=["*", "*hook_out"])
    x = reference.embed(weights, np.array(tokens))
    for layer in range(L):
        exact = reference.block(x, weights.block(layer), weights.settings, layer)
        heads = {name: exact[f"attn.{name}"].reshape(1, T, H, D) for name in "qkv"}
        expected = {
            "hook_resid_pre": x,
            "ln1.hook_out": exact["ln_1"],
            **{f"attn.hook_{name}": value for name, value in heads.items()},
            "attn.hook_pattern": exact["attn.pattern"],
            "attn.hook_z": exact["attn.attended"].swapaxes(1, 2),
            "hook_attn_out": exact["attn.c_proj"],
            "hook_resid_mid": exact["resid_mid"],
            "ln2.hook_out": exact["ln_2"],
            "mlp.hook_pre": exact["mlp.c_fc"],
            "mlp.hook_post": exact["mlp.activation"],
            "hook_mlp_out": exact["mlp.c_proj"],
            "hook_resid_post": exact["resid_post"],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(
                np.array(found[f"blocks.{layer}.{name}"]), value, rtol=0, atol=2e-5, err_msg=name
            )
        x = exact["resid_post"]


def test_normalized_is_before_the_learned_weight_and_scale_is_what_it_was_divided_by() -> None:
    model = random_model()
    _, a = trace(model, random_ids(), names=["*", "*ln1.hook_out"])
    x, normalized = a["blocks.1.hook_resid_pre"], a["blocks.1.ln1.hook_normalized"]
    assert largest_difference(normalized.mean(axis=-1), mx.zeros((B, T))) < 1e-6
    assert largest_difference(normalized * a["blocks.1.ln1.hook_scale"] + x.mean(axis=-1, keepdims=True), x) < 1e-5
    ln_1 = model.h[1].ln_1
    assert largest_difference(normalized * ln_1.weight + ln_1.bias, a["blocks.1.ln1.hook_out"]) < 1e-6


def test_scores_are_scaled_and_masked_with_minus_infinity() -> None:
    model = random_model(scale_attn_by_inverse_layer_idx=True)
    _, a = trace(model, random_ids())
    q, k = (a[f"blocks.1.attn.hook_{name}"].swapaxes(1, 2) for name in "qk")
    scores, past = np.array(a["blocks.1.attn.hook_attn_scores"]), np.tri(T, dtype=bool)
    assert (scores[..., ~past] == -np.inf).all()
    expected = np.array(q @ k.swapaxes(2, 3)) / D**0.5 / 2
    np.testing.assert_allclose(scores[..., past], expected[..., past], atol=1e-5)


# Names


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_canonical_names_of_transformerlens_3_mean_the_same_activation(alias: str, name: str) -> None:
    alias, name = (text.format(l=1, last=L - 1) for text in (alias, name))
    _, activations = trace(random_model(), random_ids(), names=[alias, name])
    assert mx.array_equal(activations[alias], activations[name])
    _, by_alias = trace(random_model(), random_ids(), names=alias)
    assert list(by_alias) == [alias]
    assert name in by_alias
    assert mx.array_equal(by_alias[name], activations[name])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.attn.hook_pattern", [f"blocks.{l}.attn.hook_pattern" for l in range(L)]),
        ("*hook_pattern", [f"blocks.{l}.attn.hook_pattern" for l in range(L)]),
        ("blocks.*.hook_out", [f"blocks.{l}.hook_out" for l in range(L)]),  # not attn.hook_out
        ("blocks.*.attn.hook_result", [f"blocks.{l}.attn.hook_result" for l in range(L)]),
        ("hook_*", ["hook_embed", "hook_pos_embed"]),
        ("*", activation_names(random_model().config)),
        (["*_scale", "hook_embed", "hook_*"], None),
    ],
)
def test_names_may_be_patterns(pattern: str | list[str], expected: list[str] | None) -> None:
    _, activations = trace(random_model(), random_ids(), names=pattern)
    assert len(activations) == 2 * L + 1 + 2 if expected is None else list(activations) == expected


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
        ("blocks.7.attn.hook_pattern", "blocks.2.attn.hook_pattern"),
        ("blocks.*.atn.hook_z", "blocks.0.attn.hook_z"),
        ("hook_zz", "blocks.0.attn.hook_z"),
        ("hook_embde", "hook_embed"),
        ("", ""),
    ],
)
def test_an_unknown_name_suggests_the_closest(name: str, closest: str) -> None:
    model, tokens = random_model(), random_ids()
    for ask in (
        lambda: trace(model, tokens, names=name),
        lambda: trace(model, tokens, names=["hook_embed", name]),
        lambda: trace(model, tokens, {name: lambda x, _: x}),
        lambda: trace(model, tokens)[1][name],
    ):
        with pytest.raises(UsageError, match=re.escape(f"no activation is named {name!r}; the closest is '{closest}")):
            ask()


def test_an_activation_that_was_not_asked_for_is_not_there() -> None:
    _, activations = trace(random_model(), random_ids(), names="hook_embed")
    assert "hook_pos_embed" not in activations
    assert activations.get("hook_pos_embed") is None
    with pytest.raises(UsageError, match="'hook_pos_embed' was not stored; name it in the names of the trace"):
        activations["hook_pos_embed"]


# Laziness


def primitives(x: mx.array, tmp_path: Path) -> dict[str, int]:
    """Count the operations that computing x takes, by kind."""
    mx.export_to_dot(str(tmp_path / "graph.dot"), x)
    kinds = re.findall(r'label ?= ?"(\w+)", shape=rectangle', (tmp_path / "graph.dot").read_text())
    assert kinds
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("names", [None, "blocks.1.attn.hook_pattern"])
def test_one_pattern_computes_only_what_leads_to_it(names: str | None, tmp_path: Path) -> None:
    _, activations = trace(random_model(), random_ids(), names=names)
    count = primitives(activations["blocks.1.attn.hook_pattern"], tmp_path)
    # The layer before: q, k, v, output, two of the MLP; scores and values. Then q and k, not v; scores.
    assert count["AddMM"] == 6 + 2
    assert count["Matmul"] == 2 + 1
    assert count["Softmax"] == 2


def test_an_activation_that_is_replaced_is_not_computed(tmp_path: Path) -> None:
    model, tokens = random_model(), random_ids()
    value = mx.zeros((B, T, C))
    _, activations = trace(
        model, tokens, {"blocks.1.hook_resid_pre": lambda x, name: value}, "blocks.1.attn.hook_pattern"
    )
    assert primitives(activations["blocks.1.attn.hook_pattern"], tmp_path)["AddMM"] == 2


@pytest.mark.freed_at_once
def test_one_pattern_takes_no_more_memory_than_a_forward_pass() -> None:
    model, tokens = random_model(n_positions=256, n_embd=64), random_ids(shape=(1, 256))

    def peak(compute: Any) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(compute())
        return mx.get_peak_memory() - before

    mx.eval(model.parameters(), tokens)
    one = peak(lambda: trace(model, tokens, names="blocks.1.attn.hook_pattern")[1])
    everything = peak(lambda: trace(model, tokens)[1])
    explicit = (
        (H + 2 * H) * 256 * 256 * 4
    )  # scores, mask and pattern of one layer, which the fused kernel does not hold
    assert one < explicit + 1.2 * peak(lambda: model(tokens))
    assert one < 0.6 * everything


# Bad input


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (mx.zeros((1, 0), mx.int32), "the text is empty; give at least one token"),
        ([[]], "the text is empty; give at least one token"),
        (mx.zeros((1, P + 1), mx.int32), f"the text is {P + 1} tokens long and the model's context is {P}; shorten it"),
        ([[V]], f"between 0 and {V - 1}"),
        ([1, 2], "of shape"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(random_model(), tokens)


def test_tokens_may_be_lists_and_numpy_arrays() -> None:
    model, tokens = random_model(), random_ids()
    for same in (tokens.tolist(), np.array(tokens)):
        assert mx.array_equal(trace(model, same)[0], trace(model, tokens)[0])
