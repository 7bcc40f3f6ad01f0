"""The configuration refuses invalid values in one line, and its presets are the published sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.model.gpt import GPT

PUBLISHED = {  # parameters, the tied head counted once
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize(("preset", "count"), PUBLISHED.items())
def test_the_releases_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    # MLX is lazy: the weights get shapes here, never values, so that even gpt2-xl takes no memory.
    assert GPT(GPTConfig.preset(preset)).n_parameters == count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_parameters_of_its_shape(preset: str) -> None:
    config = GPTConfig.preset(preset)
    V, P, C, L = config.vocab_size, config.n_positions, config.n_embd, config.n_layer
    block = 12 * C * C + 13 * C  # qkv 3, output 1, MLP 4 + 4; biases 3 + 1 + 4 + 1, two norms of 2
    assert GPT(config).n_parameters == V * C + P * C + L * block + 2 * C


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("n_positions", -1),
        ("n_embd", 768.0),
        ("n_layer", True),
        ("n_head", None),
        ("n_head", 7),  # 768 / 7 is not an integer
        ("n_inner", 0),
        ("activation_function", "prelu"),
        ("embd_pdrop", 1.0),
        ("attn_pdrop", -0.1),
        ("resid_pdrop", float("nan")),
        ("resid_pdrop", "0.1"),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", float("inf")),
        ("layer_norm_epsilon", None),
        ("initializer_range", -0.02),
        ("scale_attn_weights", "false"),  # a string, true in Python
        ("scale_attn_by_inverse_layer_idx", 0),
        ("tie_word_embeddings", None),
    ],
)
def test_an_invalid_value_is_refused_in_one_line_that_names_it(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as refusal:
        GPTConfig(**{field: value})
    message = str(refusal.value)
    assert "\n" not in message
    assert str(value) in message


def test_a_width_indivisible_by_the_heads_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"n_embd=100, n_head=3"):
        GPTConfig(n_embd=100, n_head=3)


def test_the_configuration_is_immutable() -> None:
    config = GPTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3  # type: ignore[misc]


def test_a_preset_takes_overrides_and_leaves_the_preset_alone() -> None:
    config = GPTConfig.preset("tiny", vocab_size=512)
    assert config == dataclasses.replace(PRESETS["tiny"], vocab_size=512)
    assert PRESETS["tiny"].vocab_size == 50257


def test_an_override_is_validated_like_any_other_value() -> None:
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig.preset("tiny", n_head=3)


def test_an_unknown_preset_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown preset 'gpt3'") as refusal:
        GPTConfig.preset("gpt3")
    assert all(name in str(refusal.value) for name in PRESETS)


def test_an_unknown_field_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ValueError, match="no field n_heads") as refusal:
        GPTConfig.preset("tiny", n_heads=4)
    assert "n_head," in str(refusal.value)


def test_the_widths_follow_from_the_fields() -> None:
    config = GPTConfig(n_embd=96, n_head=4)
    assert config.head_dim == 24
    assert config.inner_dim == 384
    assert GPTConfig(n_inner=100).inner_dim == 100
