"""Settings in ``config.json`` that change the logits are honoured, and those of other models are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.model.gpt import GPT
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
        ({"activation_function": "prelu"}, "activation_function must be one of gelu_new, "),
        ({"rotary_dim": 64}, "rotary_dim is no setting of GPT-2, found 64, which could change what the model computes"),
        ({"bias": False}, "bias is no setting of GPT-2, found false"),
        ({"n_special": 2}, "n_special must be off, found 2"),
        ({"use_mems": True}, "use_mems must be off, found true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is no setting of GPT-2"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map is no setting of GPT-2"),
        ({"intermediate_size": 2048}, "intermediate_size is no setting of GPT-2, found 2048"),
        ({"hidden_act": "relu"}, "hidden_act is no setting of GPT-2"),
        ({"foo": json.loads('{"a":' * 900 + "1" + "}" * 900)}, "foo is no setting of GPT-2"),
        ({"x" * 5000: "y" * 5000}, "is no setting of GPT-2"),
        ({"quantization": {"bits": 4.0, "group_size": 64}}, "quantization must be off"),
        ({"quantization": {"bits": 4, "group_size": 64.0}}, "quantization must be off"),
        ({"quantization": {"bits": 4.5, "group_size": 64}}, "quantization must be off"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "quantization must be off"),
        ({"quantization": {"bits": True, "group_size": 64}}, "quantization must be off"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": ["affine"]}}, "quantization must be off"),
        ({"quantization": [4, 64]}, "quantization must be off"),
        (
            {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 8, "group_size": 64}},
            "quantization and quantization_config must be the same",
        ),
        ({"n_positions": 2**63}, "n_positions must be an integer of at least 1 and below 2^31"),
        ({"n_layer": 12.0}, "n_layer must be an integer of at least 1 and below 2^31, not 12.0"),
        ({"n_head": -12}, "n_head must be an integer of at least 1"),
        ({"vocab_size": [50257]}, "vocab_size must be an integer"),
        ({"initializer_range": 2**200}, "initializer_range must be a number above 0"),
        ({"initializer_range": float("nan")}, "initializer_range must be a number above 0, not nan"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon must be a number above 0, not inf"),
        ({"attn_pdrop": True}, "attn_pdrop must be a probability"),
        ({"activation_function": ["gelu"]}, "activation_function must be one of"),
        ({"n_head": 7}, "n_embd must be a multiple of n_head"),
        ({"n_layer": "12"}, "n_layer must be an integer of at least 1 and below 2^31, not '12'"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ({"scale_attn_weights": "false"}, "scale_attn_weights must be true or false, not 'false'"),
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


# What config.json files of the hub hold besides the keys of OPENAI.
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True},
    "gpt2-xl": {"output_past": True},
    "distilgpt2": {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "DialoGPT": {"task_specific_params": {"conversational": {"max_length": 1000}}},
    "Chinese, of UER": {"gradient_checkpointing": False, "output_past": True, "tokenizer_class": "BertTokenizer"},
    "Korean, of SKT": {"author": "A", "created_date": "2021-04-28", "license": "CC-BY-NC-SA 4.0", "pad_token_id": 3},
    "Mistral of Stanford": {"reorder_and_upcast_attn": True, "scale_attn_weights": True, "_name_or_path": "/x"},
    "Chatterbox": {"hidden_size": 768},
    "transformers 2, every key": {
        "finetuning_task": None,
        "is_decoder": False,
        "eos_token_ids": 0,
        "num_labels": 2,
        "output_attentions": False,
        "pruned_heads": {},
        "torchscript": False,
        "use_bfloat16": False,
        "xla_device": None,
        "repetition_penalty": 1.0,
    },
    "transformers 4, of classes": {"problem_type": None, "chunk_size_feed_forward": 0, "add_cross_attention": False},
    "Megatron": {"position_embedding_type": "learned", "intermediate_size": 3072, "layer_norm_eps": 1e-5},
    "names of other models": {"n_vocab": 50257, "d_model": 768, "n_layers": 12, "afn": "gelu_new", "block_size": 1024},
    "adapters": {"adapters": {"adapters": {}, "config_map": {}}},
    "other": {"pruned_heads": {"0": []}, "rope_scaling": None, "auto_map": {}, "mask_token_id": 1, "bias": True},
}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_keys_that_cannot_change_the_logits_are_accepted(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert config_of(tmp_path, OPENAI | extra) == config_of(tmp_path, OPENAI)


def test_a_config_from_before_model_type_was_written_is_read(tmp_path: Path) -> None:
    old = {name: value for name, value in OPENAI.items() if name not in ("model_type", "architectures")}
    assert config_of(tmp_path, old) == config_of(tmp_path, OPENAI)


def test_whole_numbers_are_taken_where_any_number_is(tmp_path: Path) -> None:
    config = config_of(tmp_path, OPENAI | {"initializer_range": 2**63, "layer_norm_epsilon": 1, "attn_pdrop": 0})
    assert GPT(replace(config, vocab_size=4, n_positions=2, n_embd=4, n_layer=1, n_head=1)).n_parameters > 0
    assert type(config.layer_norm_epsilon) is float
