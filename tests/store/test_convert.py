"""Every layout of GPT-2 weights on the hub becomes the same parameters, and other models are refused by name."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.convert import from_hub, hub_shapes, to_hub

TINY = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
UNTIED = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False)


def parameters(config: GPTConfig = TINY) -> dict[str, mx.array]:
    mx.random.seed(0)
    return dict(tree_flatten(GPT(config).parameters()))


def hub(config: GPTConfig = TINY) -> dict[str, mx.array]:
    return to_hub(parameters(config))


def same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> bool:
    return set(found) == set(expected) and all(mx.array_equal(found[name], expected[name]) for name in found)


@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    layers=st.integers(1, 3),
    inner=st.none() | st.integers(1, 9),
    tied=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_converting_to_the_hub_and_back_changes_no_bit(
    heads: int, head_dim: int, layers: int, inner: int | None, tied: bool
) -> None:
    config = GPTConfig(
        vocab_size=7,
        n_positions=3,
        n_embd=heads * head_dim,
        n_layer=layers,
        n_head=heads,
        n_inner=inner,
        tie_word_embeddings=tied,
    )
    ours = parameters(config)
    assert {name: weight.shape for name, weight in to_hub(ours).items()} == hub_shapes(config)
    assert same(from_hub(to_hub(ours), config), ours)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_hub_has_exactly_our_parameters_at_every_size(preset: str) -> None:
    config = PRESETS[preset]
    ours = {name: weight.size for name, weight in tree_flatten(GPT(config).parameters())}  # lazy: shapes, no values
    theirs = {name: mx.zeros(shape).size for name, shape in hub_shapes(config).items()}
    assert ours == theirs


def test_four_kinds_of_matrix_are_transposed_and_nothing_else() -> None:
    ours, theirs = parameters(), hub()
    flipped = {name for name in ours if not mx.array_equal(ours[name].reshape(-1), theirs[name].reshape(-1))}
    assert flipped == {
        f"h.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert all(mx.array_equal(ours[name].T, theirs[name]) for name in flipped)


def test_a_prefix_mask_buffers_and_the_copy_of_a_tied_head_make_no_difference() -> None:
    old = {f"transformer.{name}": weight for name, weight in hub().items()}
    for i in range(TINY.n_layer):
        old[f"transformer.h.{i}.attn.bias"] = mx.tri(6).astype(mx.uint8).reshape(1, 1, 6, 6)
        old[f"transformer.h.{i}.attn.masked_bias"] = mx.array(-1e4)
    old["lm_head.weight"] = old["transformer.wte.weight"]
    assert same(from_hub(old, TINY), parameters())
    unprefixed = {name.removeprefix("transformer."): weight for name, weight in old.items()}
    assert same(from_hub(unprefixed, TINY), parameters())


def test_an_untied_head_is_kept_if_the_config_says_so() -> None:
    assert same(from_hub(hub(UNTIED), UNTIED), parameters(UNTIED))


def test_an_untied_head_is_refused_if_the_config_says_it_is_tied() -> None:
    weights = hub() | {"lm_head.weight": hub()["wte.weight"] + 1}
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight: expected a copy of wte\.weight.*tie_word_embeddings"):
        from_hub(weights, TINY)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_becomes_float32_by_default(dtype: mx.Dtype) -> None:
    halves = {name: weight.astype(dtype) for name, weight in hub().items()}
    assert {weight.dtype for weight in from_hub(halves, TINY).values()} == {mx.float32}
    assert {weight.dtype for weight in from_hub(halves, TINY, dtype=dtype).values()} == {dtype}
    assert same(to_hub(from_hub(halves, TINY)), {name: weight.astype(mx.float32) for name, weight in halves.items()})


def changed(**changes: mx.array | None) -> dict[str, mx.array]:
    weights = hub() | {name.replace("__", "."): value for name, value in changes.items() if value is not None}
    return {name: weight for name, weight in weights.items() if changes.get(name.replace(".", "__"), 0) is not None}


REFUSALS = {
    "a missing tensor": (changed(h__1__ln_2__bias=None), "h.1.ln_2.bias: expected shape (8,), found no such tensor;"),
    "several missing": (
        changed(h__0__ln_1__bias=None, ln_f__bias=None),
        "h.0.ln_1.bias: expected shape (8,), found no such tensor (and 1 more like it);",
    ),
    "nothing at all": ({}, "wte.weight: expected shape (11, 8), found no such tensor (and 27 more like it);"),
    "an unexpected tensor": (
        changed(h__2__ln_1__bias=mx.zeros(8)),
        "h.2.ln_1.bias: expected no such tensor, found shape (8,); compare n_layer",
    ),
    "another task's head": (changed(score__weight=mx.zeros((2, 8))), "score.weight: expected no such tensor"),
    "a larger vocabulary": (
        changed(wte__weight=mx.zeros((16, 8))),
        'wte.weight: expected shape (11, 8), found (16, 8); if the weights are right, write "vocab_size": 16',
    ),
    "fewer positions": (
        changed(wpe__weight=mx.zeros((5, 8))),
        'wpe.weight: expected shape (6, 8), found (5, 8); if the weights are right, write "n_positions": 5',
    ),
    "the layout of nanoGPT and llm.c": (
        parameters(),
        "h.0.attn.c_attn.weight: expected shape (8, 24), found (24, 8); the matrices are (out, in)",
    ),
    "another width": (
        changed(h__0__mlp__c_fc__bias=mx.zeros(24)),
        "h.0.mlp.c_fc.bias: expected shape (32,), found (24,); the weights and config.json do not belong together",
    ),
    "integers": (
        changed(ln_f__bias=mx.zeros(8, mx.int8)),
        "ln_f.bias: expected floats of shape (8,), found mlx.core.int8; if the model is quantized",
    ),
    "two models in one": (
        hub() | {"transformer.ln_f.bias": mx.zeros(8)},
        "ln_f.bias: expected once, found with and without a prefix",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_weights_of_another_model_are_refused_in_one_line_that_names_the_tensor(case: str) -> None:
    weights, message = REFUSALS[case]
    with pytest.raises(ModelFolderError, match=re.escape(message)) as refusal:
        from_hub(weights, TINY)
    assert "\n" not in str(refusal.value)
