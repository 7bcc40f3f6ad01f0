"""nanoGPT's ``ckpt.pt``: a dict of ``model``, the tensors, and ``model_args``, the architecture (its ``train.py``)."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import linear_shapes
from mlx_gpt.store.model_config import config_of
from mlx_gpt.store.pickles import arrays_of, import_torch
from mlx_gpt.store.source import ModelSource

CHECKPOINT = "ckpt.pt"
# nanoGPT's names of GPTConfig's fields.
FIELDS = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"block_size": "n_positions"}
COMPILED = "_orig_mod."  # the prefix that torch.compile adds to names


def is_nanogpt(content: Any) -> bool:
    """Return True for the content of a nanoGPT checkpoint."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def read_nanogpt(content: dict[str, Any], file: Path) -> ModelSource:
    """Return the model in a checkpoint, matrices (out, in). Absent biases (``bias=False``) become 0."""
    args = content["model_args"]
    config = _read_config(args, file)
    tensors = content["model"]
    if isinstance(tensors, dict):
        tensors = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    weights = arrays_of(tensors, file)
    if not args.get("bias", True):
        biases = {f"transformer.{name}": s for name, s in linear_shapes(config).items() if name.endswith(".bias")}
        weights = {name: mx.zeros(shape) for name, shape in biases.items()} | weights
    return ModelSource("nanoGPT", file.parent, config, weights, is_linear=True)


def write_nanogpt(file: Path, source: ModelSource, dtype: mx.Dtype) -> None:
    """Write a model as nanoGPT's ``sample.py`` reads it. Training needs nanoGPT's own checkpoint, with an optimizer."""
    torch, config, weights = import_torch(file), source.config, source.parameters(None)
    model = {f"transformer.{name}": torch.from_numpy(_to_numpy(weights.pop(name), dtype)) for name in list(weights)}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    args |= {"bias": True, "dropout": config.resid_pdrop}
    torch.save({"model": model, "model_args": args, "iter_num": 0, "best_val_loss": inf, "config": {}}, file)


def _read_config(args: Any, file: Path) -> GPTConfig:
    names = set(args) if isinstance(args, dict) else set()
    if wrong := sorted(names - {*FIELDS, "bias", "dropout"}) or sorted(FIELDS.keys() - names):
        raise ModelFolderError(
            f"{file}: expected in model_args {', '.join(FIELDS)}, bias and dropout, and {wrong[0]} "
            f"{'is none of them' if wrong[0] in names else 'is missing'}; this is another model than nanoGPT's"
        )
    settings = {ours: args[theirs] for theirs, ours in FIELDS.items()}
    settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.get("dropout", 0.0))
    return config_of(file, **settings, activation_function="gelu")  # the exact one, for OpenAI's weights too (model.py)


def _to_numpy(weight: mx.array, dtype: mx.Dtype) -> np.ndarray:
    mx.eval(weight := weight.astype(dtype))
    return np.array(weight)
