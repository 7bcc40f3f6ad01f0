"""The parts of the residual stream sum to it, and what they add sums to the logit difference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, C, H, L, T, V, largest_difference, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import decompose_resid, logit_attribution, logit_direction, logit_lens, logit_lens_top, trace
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize

VARIANTS: list[dict[str, Any]] = [{}, {"tie_word_embeddings": False}, {"layer_norm_epsilon": 0.1}]
MODEL, TOKENS = random_model(), random_ids()


def traced(model: GPT, **more: Any) -> tuple[mx.array, Any]:
    return trace(model, TOKENS, **more)


# The logit lens


def test_the_last_layer_of_the_logit_lens_is_the_model() -> None:
    logits, activations = traced(MODEL)
    found = logit_lens(MODEL, activations)
    assert found.shape == (L + 1, B, T, V)
    assert largest_difference(found[-1], logits) < 1e-5


def test_each_layer_is_the_model_without_the_later_layers() -> None:
    found = logit_lens(MODEL, traced(MODEL)[1])
    for layer in range(L + 1):
        shorter = random_model()
        shorter.h = shorter.h[:layer]
        assert largest_difference(found[layer], shorter(TOKENS)) < 1e-5


def test_the_most_probable_tokens_of_each_layer_are_sorted() -> None:
    _, activations = traced(MODEL)
    ids, logprobs = logit_lens_top(MODEL, activations, k=4)
    logp = np.array(logit_lens(MODEL, activations), np.float64)
    logp -= np.log(np.exp(logp).sum(axis=-1, keepdims=True))
    assert ids.shape == logprobs.shape == (L + 1, B, T, 4)
    np.testing.assert_allclose(np.array(logprobs), -np.sort(-logp, axis=-1)[..., :4], atol=1e-5)
    np.testing.assert_array_equal(np.array(ids), np.argsort(-logp, axis=-1)[..., :4])


# The parts


def test_the_parts_of_the_residual_stream_sum_to_it() -> None:
    _, activations = traced(MODEL)
    for by, n in (("layer", 2 + 2 * L), ("head", 2 + L * (H + 2))):
        parts, labels = decompose_resid(MODEL, activations, by)
        assert parts.shape == (n, B, T, C)
        assert len(set(labels)) == len(labels) == n
        assert largest_difference(parts.sum(axis=0), activations[f"blocks.{L - 1}.hook_resid_post"]) < 1e-4


def test_labels_are_those_of_transformerlens() -> None:
    _, activations = traced(MODEL)
    assert decompose_resid(MODEL, activations)[1][:4] == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]
    heads = [f"L0H{head}" for head in range(H)]
    assert decompose_resid(MODEL, activations, "head")[1][2 : 4 + H] == [*heads, "0_attn_bias", "0_mlp_out"]


def test_a_head_is_its_result() -> None:
    _, activations = traced(MODEL, names=["*", "*hook_result"])
    parts, labels = decompose_resid(MODEL, activations, "head")
    result = activations["blocks.1.attn.hook_result"]
    assert largest_difference(parts[labels.index("L1H2")], result[:, :, 2]) < 1e-5


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: " ".join(fields) or "gpt2")
def test_the_values_sum_to_the_logit_difference(fields: dict[str, Any], by: str) -> None:
    model = random_model(**fields)
    logits, activations = traced(model)
    values, labels = logit_attribution(model, activations, logit_direction(model, 3, 5), by)
    assert values.shape == (len(labels), B, T)
    assert largest_difference(values.sum(axis=0), logits[..., 3] - logits[..., 5]) < 1e-4
    one, _ = logit_attribution(model, activations, logit_direction(model, 7), by)
    assert largest_difference(one.sum(axis=0), logits[..., 7]) < 1e-4


def test_the_values_of_rows_with_their_own_tokens_sum_to_their_logit_differences() -> None:
    logits, activations = traced(MODEL)
    values, _ = logit_attribution(MODEL, activations, logit_direction(MODEL, [3, 4], [5, 6]))
    expected = mx.stack([logits[0, :, 3] - logits[0, :, 5], logits[1, :, 4] - logits[1, :, 6]])
    assert largest_difference(values.sum(axis=0), expected) < 1e-4


def test_the_values_of_an_edited_and_of_a_quantized_model_sum_too() -> None:
    logits, activations = traced(MODEL, edits={"blocks.1.attn.hook_pattern": lambda x, name: x * 0.5})
    values, _ = logit_attribution(MODEL, activations, logit_direction(MODEL, 3, 5), "head")
    assert largest_difference(values.sum(axis=0), logits[..., 3] - logits[..., 5]) < 1e-4
    model = quantize(random_model(n_embd=64), 8)
    logits, activations = traced(model)
    values, _ = logit_attribution(model, activations, logit_direction(model, 3, 5), "neuron")
    assert largest_difference(values.sum(axis=0), logits[..., 3] - logits[..., 5]) < 1e-3


def test_finer_parts_sum_to_coarser_ones() -> None:
    _, activations = traced(MODEL)
    direction = logit_direction(MODEL, 3, 5)
    values = {by: logit_attribution(MODEL, activations, direction, by) for by in ("layer", "head", "neuron")}

    def total(by: str, prefixes: tuple[str, ...]) -> mx.array:
        array, labels = values[by]
        return mx.stack([row for row, label in zip(array, labels, strict=True) if label.startswith(prefixes)]).sum(
            axis=0
        )

    assert largest_difference(total("layer", ("1_attn_out",)), total("head", ("L1H", "1_attn_bias"))) < 1e-4
    assert largest_difference(total("layer", ("1_mlp_out",)), total("neuron", ("L1N", "1_mlp_bias"))) < 1e-4


def test_an_unknown_part_or_token_is_refused() -> None:
    _, activations = traced(MODEL)
    with pytest.raises(UsageError, match="by layer or head, not 'word'"):
        decompose_resid(MODEL, activations, "word")
    with pytest.raises(UsageError, match="by layer, head or neuron, not 'word'"):
        logit_attribution(MODEL, activations, logit_direction(MODEL, 1), "word")
    for token in (V, -1, [0, V]):
        with pytest.raises(ValueError, match=f"between 0 and {V - 1}"):
            logit_direction(MODEL, token)
