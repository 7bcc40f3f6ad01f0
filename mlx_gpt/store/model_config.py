"""Read and write ``config.json``: a setting that changes the logits is honoured or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import parse_json, read_small
from mlx_gpt.store.config_keys import ALIASES, OFF, QUANTIZED, is_harmless
from mlx_gpt.store.convert import Quantization

CONFIG = "config.json"
LIMIT = 2_000_000  # bytes; a config.json has hundreds, the index of a thousand layers under a million


def read_config(path: str | os.PathLike[str]) -> GPTConfig:
    """Return the ``GPTConfig`` in a ``config.json``, given as the file or its folder.

    Absent settings have transformers' defaults (dropout: none). Raises ``ModelFolderError`` for another model than
    GPT-2, and for a setting that could change the logits (``config_keys.py``).
    """
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / CONFIG
    found = read_json(file)
    is_old = "model_type" not in found and {"n_embd", "n_head"} <= found.keys()  # before transformers 2.3
    if found.get("model_type") != "gpt2" and not is_old:
        raise ModelFolderError(
            f'{file}: expected "model_type": "gpt2", found {_short(found.get("model_type"))}; '
            f"this package reads GPT-2 only"
        )
    settings = _resolve_aliases(found, file)
    _parse_quantization(settings, file)
    own = {field.name for field in fields(GPTConfig)}
    config = config_of(file, **{key: value for key, value in settings.items() if key in own})
    for key, value in settings.items():
        if key not in own and key not in QUANTIZED and not is_harmless(key, value, config):
            problem = "must be off" if key in OFF else "is no setting of GPT-2"
            raise ModelFolderError(
                f"{file}: {key} {problem}, found {_short(value)}, which could change what the model computes; "
                f"if it does not, remove it from the file"
            )
    return config


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


def config_json(
    config: GPTConfig, end_ids: Sequence[int], start_id: int, dtype: mx.Dtype, quantization: Quantization | None = None
) -> str:
    """Return a ``config.json`` that transformers and mlx-lm read as this model; a quantized one, mlx-lm only.

    A text ends at any of ``end_ids``; ``start_id`` begins an empty one.
    """
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **asdict(config),
        "n_ctx": config.n_positions,  # mlx-lm requires it, transformers 5 no longer writes it
        "bos_token_id": start_id,
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else [*end_ids] or None,
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
    given = {key: value for key in QUANTIZED if (value := settings.get(key))}
    found = {_quantization(key, value, file) for key, value in given.items()}
    if len(found) > 1:
        raise ModelFolderError(f"{file}: {' and '.join(given)} must be the same, found two; take the float model")
    return next(iter(found), None)


def _quantization(key: str, value: Any, file: Path) -> Quantization:
    known: dict[str, Any] = {"mode": "affine"} | value if isinstance(value, dict) else {}
    sizes: Any = known.get("group_size"), known.get("bits")
    if (
        known.keys() != {"group_size", "bits", "mode"}
        or known["mode"] != "affine"
        or any(type(size) is not int for size in sizes)  # 4.0 equals 4, but MLX refuses it
        or sizes not in product((32, 64, 128), (2, 3, 4, 5, 6, 8))
    ):
        raise ModelFolderError(
            f"{file}: {key} must be off, or MLX's affine kind with bits and group_size, found "
            f"{_short(value)}; use the float model"
        )
    return Quantization(*sizes)


def _resolve_aliases(found: dict[str, Any], file: Path) -> dict[str, Any]:
    settings = {key: value for key, value in found.items() if key not in ALIASES}
    for alias, name in ALIASES.items():
        if alias in found and settings.setdefault(name, found[alias]) != found[alias]:
            raise ModelFolderError(
                f"{file}: {alias} and {name} are the same setting, but found {_short(found[alias])} and "
                f"{_short(settings[name])}; correct the file"
            )
    if "n_ctx" in found:  # older files may have this name only
        settings.setdefault("n_positions", found["n_ctx"])
    return settings


def _short(value: Any) -> str:
    """Return a value of a file as JSON, cut to fit a message."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "values nested deeply"
    return text if len(text) <= 100 else f"{text[:100]}…"
