"""Settings in ``config.json`` that change the logits are honoured, and those of other models are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.model_config import read_config

TINY_GPT2 = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"

OPENAI = {  # of openai-community/gpt2
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def config_of(tmp_path: Path, settings: Any) -> GPTConfig:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return read_config(tmp_path)


def test_the_config_of_openais_gpt2_is_our_default_but_for_dropout(tmp_path: Path) -> None:
    config = config_of(tmp_path, OPENAI)
    assert config == GPTConfig(attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    older = {name: value for name, value in OPENAI.items() if name != "n_positions"} | {"n_ctx": 512}
    assert config_of(tmp_path, older) == replace(config, n_positions=512)


def test_a_config_as_transformers_5_writes_it_is_read() -> None:
    config = read_config(TINY_GPT2 / "config.json")  # without n_ctx
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head) == (97, 24, 3, 4)


@pytest.mark.parity
def test_every_key_that_transformers_writes_is_known(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers.GPT2Config().to_json_string(use_diff=False))
    assert config_of(tmp_path, written) == replace(GPTConfig(), attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)


def test_every_setting_that_changes_the_logits_is_honoured(tmp_path: Path) -> None:
    other = GPTConfig(100, 16, 32, 3, 4, 48, "gelu", 0.3, 0.4, 0.5, 1e-6, 0.1, False, True, False)
    assert not [name for name, value in asdict(other).items() if value == getattr(GPTConfig(), name)]
    assert config_of(tmp_path, asdict(other) | {"model_type": "gpt2"}) == other


def test_transformers_general_names_are_aliases_of_gpt2s(tmp_path: Path) -> None:
    names = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16}
    config = config_of(tmp_path, names | {"model_type": "gpt2"})
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (32, 3, 4, 16)
    with pytest.raises(
        ModelFolderError, match="num_attention_heads and n_head are the same setting, but found 4 and 8"
    ):
        config_of(tmp_path, names | {"model_type": "gpt2", "n_head": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, 'expected "model_type": "gpt2", found "llama"'),
        ({"model_type": None}, 'expected "model_type": "gpt2", found null'),
        ({"add_cross_attention": True}, "add_cross_attention must be off, found true"),
        ({"quantization": {"bits": 4}}, "quantization must be off"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be off"),
        ({"activation_function": "relu"}, "activation_function must be one of gelu_new, gelu, not 'relu'"),
        ({"rotary_dim": 64}, "unknown setting rotary_dim = 64, which could change what the model computes"),
        ({"bias": False}, "unknown setting bias = false"),
        ({"n_head": 7}, "n_embd must be a multiple of n_head"),
        ({"n_layer": "12"}, "n_layer must be an integer of at least 1, not '12'"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ({"scale_attn_weights": "false"}, 'scale_attn_weights must be true or false, found "false"'),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_by_the_setting(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFolderError) as error:
        config_of(tmp_path, OPENAI | change)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


def test_disabled_and_harmless_settings_are_accepted(tmp_path: Path) -> None:
    extra = {"add_cross_attention": False, "pruned_heads": {}, "reorder_and_upcast_attn": True, "temperature": 0.7}
    assert config_of(tmp_path, OPENAI | extra) == config_of(tmp_path, OPENAI)
