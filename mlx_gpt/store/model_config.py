"""Read and write ``config.json``: a setting that changes the logits is honoured or refused by name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import parse_json, read_small
from mlx_gpt.store.convert import Quantization

CONFIG = "config.json"
LIMIT = 2_000_000  # bytes; a config.json has hundreds, the index of a thousand layers under a million

# Keys of a GPT-2 config.json (transformers' GPT2Config and PreTrainedConfig, 4.x and 5.x) that do not change the
# logits: labels, other tasks' heads, outputs, precision, generation.
HARMLESS = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path _commit_hash tokenizer_class
    task_specific_params finetuning_task prefix torch_dtype dtype use_bfloat16 n_ctx transformers.js_config
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    num_labels _num_labels id2label label2id problem_type
    use_cache output_past output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    torchscript is_decoder tf_legacy_loss gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn
    attn_implementation _attn_implementation _attn_implementation_autoset
    do_sample temperature top_k top_p typical_p epsilon_cutoff eta_cutoff min_length max_length max_new_tokens
    num_beams num_beam_groups diversity_penalty early_stopping length_penalty repetition_penalty
    encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id num_return_sequences remove_invalid_values
    exponential_decay_length_penalty
    """.split()  # noqa: SIM905
)
# Keys that are harmless only if false, null or empty.
OFF = {"add_cross_attention", "cross_attention_hidden_size", "is_encoder_decoder", "tie_encoder_decoder"}
OFF |= {"pruned_heads", "per_layer_config"}
QUANTIZED = ("quantization", "quantization_config")  # mlx-lm writes both
ALIASES = {  # transformers' general names for GPT-2's fields
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(path: str | os.PathLike[str]) -> GPTConfig:
    """Return the ``GPTConfig`` in a ``config.json``, given as the file or its folder.

    Absent settings have transformers' defaults (dropout: none). Raises ``ModelFolderError`` for another model than
    GPT-2, and for an unknown setting, which could change the logits.
    """
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / CONFIG
    found = read_json(file)
    if found.get("model_type") != "gpt2":
        raise ModelFolderError(
            f'{file}: expected "model_type": "gpt2", found {json.dumps(found.get("model_type"))}; '
            f"this package reads GPT-2 only"
        )
    settings = _resolve_aliases(found, file)
    _parse_quantization(settings, file)
    own = {field.name: field for field in fields(GPTConfig)}
    for key, value in settings.items():
        if key in OFF and value:
            raise ModelFolderError(f"{file}: {key} must be off, found {json.dumps(value)}; this GPT-2 is another model")
        if key not in own and key not in OFF and key not in HARMLESS and key not in QUANTIZED:
            raise ModelFolderError(
                f"{file}: unknown setting {key} = {json.dumps(value)}, which could change what the model computes; "
                f"if it does not, remove it from the file"
            )
        if key in own and own[key].type == "bool" and not isinstance(value, bool):
            raise ModelFolderError(f"{file}: {key} must be true or false, found {json.dumps(value)}; correct the file")
    return config_of(file, **{key: value for key, value in settings.items() if key in own})


def config_of(file: Path, **settings: Any) -> GPTConfig:
    """Return the ``GPTConfig`` with the settings of a file. Raises ``ModelFolderError`` if they are invalid."""
    try:
        return GPTConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"{file}: {error}") from error


def read_quantization(folder: str | os.PathLike[str]) -> Quantization | None:
    """Return the quantization of a folder's matrices, or None."""
    file = Path(folder) / CONFIG
    return _parse_quantization(read_json(file), file)


def config_json(config: GPTConfig, eot_id: int, dtype: mx.Dtype, quantization: Quantization | None = None) -> str:
    """Return a ``config.json`` that transformers and mlx-lm read as this model; a quantized one, mlx-lm only."""
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **asdict(config),
        "n_ctx": config.n_positions,  # mlx-lm requires it, transformers 5 no longer writes it
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
        **(dict.fromkeys(QUANTIZED, quantization._asdict()) if quantization else {}),
    }
    return json.dumps(settings, indent=2) + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder. Raises ``ModelFolderError``."""
    try:
        value = parse_json(read_small(file, LIMIT))
    except OSError as error:
        raise ModelFolderError(
            f"{file}: expected a settings file, but it cannot be read ({error.strerror}); "
            f"a model folder holds {CONFIG}, model.safetensors and a tokenizer"
        ) from error
    except ValueError as error:  # bad JSON, or not UTF-8
        raise ModelFolderError(f"{file}: expected JSON, found something else ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{file}: expected a JSON object, found {type(value).__name__}; fetch it again")
    return value


def _parse_quantization(settings: dict[str, Any], file: Path) -> Quantization | None:
    """Return the quantization that mlx-lm wrote; refuse any other kind, such as one per layer."""
    for key in QUANTIZED:
        if value := settings.get(key):
            known: dict[str, Any] = {"mode": "affine"} | value if isinstance(value, dict) else {}
            if (
                known.keys() != {"group_size", "bits", "mode"}
                or known["mode"] != "affine"
                or known["bits"] not in (2, 3, 4, 5, 6, 8)
                or known["group_size"] not in (32, 64, 128)
            ):
                raise ModelFolderError(
                    f"{file}: {key} must be off, or MLX's affine kind with bits and group_size, found "
                    f"{json.dumps(value)[:100]}; use the float model"
                )
            return Quantization(known["group_size"], known["bits"])
    return None


def _resolve_aliases(found: dict[str, Any], file: Path) -> dict[str, Any]:
    settings = {key: value for key, value in found.items() if key not in ALIASES}
    for alias, name in ALIASES.items():
        if alias in found and settings.setdefault(name, found[alias]) != found[alias]:
            raise ModelFolderError(
                f"{file}: {alias} and {name} are the same setting, but found {found[alias]} and {settings[name]}; "
                f"correct the file"
            )
    if "n_ctx" in found:  # older files may have this name only
        settings.setdefault("n_positions", found["n_ctx"])
    return settings
