"""nanoGPT's ``ckpt.pt``: a dict with ``model``, the tensors, and ``model_args``, the settings (its ``train.py``)."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.store.convert import Weights, linear_shapes
from mlx_gpt.store.pickles import arrays_of, import_torch

CHECKPOINT = "ckpt.pt"
OURS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
OURS |= {"vocab_size": "vocab_size"}
COMPILED = "_orig_mod."  # what torch.compile puts in front of names
# What nanoGPT computes, whatever the file (model.py). Its GELU is the exact one, for OpenAI's weights too.
FIXED: dict[str, Any] = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None}
FIXED |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def is_nanogpt(content: Any) -> bool:
    """Whether this is what nanoGPT saves."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def from_nanogpt(content: dict[str, Any], file: Path) -> tuple[GPTConfig, Weights]:
    """The settings and the tensors of a checkpoint, matrices (out, in). Biases left out (``bias=False``) are 0."""
    args = content["model_args"]
    if not isinstance(args, dict) or not OURS.keys() <= args.keys() <= {*OURS, "bias", "dropout"}:
        names = args if isinstance(args, dict) else []
        odd = sorted(set(names) - {*OURS, "bias", "dropout"}) or sorted(set(OURS) - set(names))
        raise ModelFolderError(
            f"{file}: expected in model_args {', '.join(OURS)}, bias and dropout, and {odd[0]} "
            f"{'is none of them' if odd[0] in names else 'is missing'}; this is another model than nanoGPT's"
        )
    settings = {ours: args[theirs] for theirs, ours in OURS.items()}
    settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.get("dropout", 0.0))
    try:
        config = GPTConfig(**settings, activation_function="gelu")
    except UsageError as error:
        raise ModelFolderError(f"{file}: {error}") from error
    named = content["model"]
    if isinstance(named, dict):
        named = {name.removeprefix(COMPILED): tensor for name, tensor in named.items()}
    weights = arrays_of(named, file)
    if not args.get("bias", True):
        biases = {f"transformer.{name}": s for name, s in linear_shapes(config).items() if name.endswith(".bias")}
        weights = {name: mx.zeros(shape) for name, shape in biases.items()} | weights
    return config, weights


def write_nanogpt(file: Path, config: GPTConfig, weights: Weights) -> None:
    """Write our parameters as nanoGPT's ``sample.py`` reads them, in float32. Empties ``weights``.

    There is no optimizer in it: to train on, nanoGPT wants its own checkpoint.
    """
    torch = import_torch(file)
    model = {f"transformer.{name}": torch.from_numpy(_numpy(weights.pop(name))) for name in list(weights)}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {theirs: getattr(config, ours) for theirs, ours in OURS.items()}
    args |= {"bias": True, "dropout": config.resid_pdrop}
    torch.save({"model": model, "model_args": args, "iter_num": 0, "best_val_loss": inf, "config": {}}, file)


def _numpy(weight: mx.array) -> np.ndarray:
    mx.eval(weight := weight.astype(mx.float32))
    return np.array(weight)
