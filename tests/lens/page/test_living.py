"""The data of a living page: all weights by the hub's names, in float16."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers.lens_model import C, L, V, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.page.living import half_weights, living_data
from mlx_gpt.model.quantize import quantize
from mlx_gpt.text.tokenizer import Tokenizer


def test_the_weights_of_a_page_have_the_hubs_names() -> None:
    weights = half_weights(random_model(tie_word_embeddings=False))
    assert len(weights) == 5 + 12 * L
    assert weights["h.2.attn.c_attn.weight"].shape == (3 * C, C)
    assert weights["lm_head.weight"].shape == weights["wte.weight"].shape == (V, C)


def test_the_data_is_json_that_is_not_much_larger_than_the_weights() -> None:
    model = random_model(n_embd=64)
    data = json.dumps(living_data(model, Tokenizer.bytes(), ["a"], "small"))
    assert len(data) < 1.4 * 2 * model.n_parameters + 20_000
    assert json.loads(data)["parameters"] == model.n_parameters


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_has_as_many_parameters_as_before(bits: int) -> None:
    model = random_model(n_embd=64)
    n = model.n_parameters
    assert living_data(quantize(model, bits), Tokenizer.bytes(), [], "small")["parameters"] == n > model.n_parameters


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_weights_that_float16_cannot_hold_are_refused(factor: float) -> None:
    model = random_model()
    model.h[0].mlp.c_fc.weight = model.h[0].mlp.c_fc.weight * mx.array(factor)
    with pytest.raises(UsageError, match=r"h.0.mlp.c_fc.weight has numbers that are no float16"):
        living_data(model, Tokenizer.bytes(), [], "large")
