"""nanoGPT's ``ckpt.pt``: a dict of ``model``, the tensors, and ``model_args``, the architecture (its ``train.py``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights, linear_shapes
from mlx_gpt.store.model_config import config_of
from mlx_gpt.store.pickles import import_torch
from mlx_gpt.store.source import ModelSource
from mlx_gpt.text.characters import META, CharacterTokenizer, read_meta
from mlx_gpt.text.vocab_files import has_vocabulary

CHECKPOINT = "ckpt.pt"
# nanoGPT's names of GPTConfig's fields.
FIELDS = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"block_size": "n_positions"}


def read_model_args(args: Any, file: Path) -> GPTConfig:
    """Return the architecture in a checkpoint's ``model_args``.

    With ``bias`` among them the activation is the exact GELU; without, the tanh form, as in nanoGPT before that setting
    and in build-nanogpt (the ``model.py`` of each).
    """
    names = set(args) if isinstance(args, dict) else set()
    if wrong := sorted(map(str, names - {*FIELDS, "bias", "dropout"})) or sorted(FIELDS.keys() - names):
        raise ModelFolderError(
            f"{file}: expected in model_args {', '.join(FIELDS)}, bias and dropout, and {wrong[0]} "
            f"{'is none of them' if wrong[0] in names else 'is missing'}; this is another model than nanoGPT's"
        )
    settings = {ours: args[theirs] for theirs, ours in FIELDS.items()}
    settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.get("dropout", 0.0))
    return config_of(file, **settings, activation_function="gelu" if "bias" in args else "gelu_new")


def find_characters(folder: Path, content: Mapping[Any, Any]) -> CharacterTokenizer | None:
    """Return the characters of a checkpoint's data, from ``meta.pkl`` in its folder or in nanoGPT's folder of data.

    None for a checkpoint without, and for one whose folder has a vocabulary of tokens.
    """
    if has_vocabulary(folder):
        return None
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    places = [folder / META]
    if isinstance(dataset, str) and re.fullmatch(r"[\w-]+", dataset):
        places.append(folder.resolve().parent / "data" / dataset / META)
    return next((read_meta(file) for file in places if file.exists()), None)


def add_biases(weights: Weights, config: GPTConfig) -> Weights:
    """Return parameters with those biases as 0 that a model of ``bias=False`` lacks."""
    prefix = next(name.removesuffix("wpe.weight") for name in weights if name.endswith("wpe.weight"))
    biases = {name: shape for name, shape in linear_shapes(config).items() if name.endswith(".bias")}
    return {f"{prefix}{name}": mx.zeros(shape) for name, shape in biases.items()} | weights


def write_nanogpt(file: Path, source: ModelSource, dtype: mx.Dtype) -> None:
    """Write a model as nanoGPT's ``sample.py`` reads it. Training needs nanoGPT's own checkpoint, with an optimizer."""
    torch, config, weights = import_torch(file), source.config, source.parameters(None)
    model = {f"transformer.{name}": torch.from_numpy(_to_numpy(weights.pop(name), dtype)) for name in list(weights)}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    args |= {"bias": True, "dropout": config.resid_pdrop}
    torch.save({"model": model, "model_args": args, "iter_num": 0, "best_val_loss": inf, "config": {}}, file)


def _to_numpy(weight: mx.array, dtype: mx.Dtype) -> np.ndarray:
    mx.eval(weight := weight.astype(dtype))
    return np.array(weight)
