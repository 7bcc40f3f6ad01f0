"""The hub's layout: ``config.json`` and safetensors, whole or in shards. mlx-lm's folders differ in names only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import MLX_LM, Weights, is_buffer, is_linear
from mlx_gpt.store.model_config import read_config, read_json, read_quantization
from mlx_gpt.store.safetensors import read_safetensors
from mlx_gpt.store.source import ModelSource

HUB = "Hugging Face"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # a file beside the index, nowhere else


def has_safetensors(folder: Path) -> bool:
    """Return True if a folder has weights as safetensors, whole or in shards."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def is_safetensors(path: Path) -> bool:
    """Return True for a file that begins as safetensors does, with the length of a JSON object and the object."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return re.fullmatch(rb".{5}\0{3}\{", stream.read(9), re.DOTALL) is not None


def read_huggingface(path: Path) -> ModelSource:
    """Read a folder in the layout of transformers or of mlx-lm, perhaps quantized, or a file of weights in one."""
    is_file = path.is_file()
    folder = path.parent if is_file else path
    config, weights = read_config(folder), read_safetensors(path) if is_file else read_weights(folder)
    quantization = read_quantization(folder) if any(name.endswith(".scales") for name in weights) else None
    kind = "mlx-lm" if any(name.startswith(MLX_LM) for name in weights) else "safetensors" if is_file else HUB
    return ModelSource(kind, folder, config, weights, bool(quantization) or is_linear(weights), quantization)


def read_weights(folder: Path) -> Weights:
    """Return the tensors of a folder by the names in its files, lazily."""
    if (folder / WEIGHTS).exists():  # it takes precedence over an index, as in transformers
        return read_safetensors(folder / WEIGHTS)
    return read_shards(folder / INDEX, read_safetensors)


def read_shards(index: Path, read: Callable[[Path], Weights]) -> Weights:
    """Return the tensors that an index lists, each from its shard."""
    weight_map: Any = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if wrong := [shard for shard in shards if not isinstance(shard, str) or not SHARD.fullmatch(shard)]:
        found = f"{wrong[0]!r:.80}" if weight_map else "none"
        raise ModelFolderError(
            f"{index}: expected a weight_map of tensors to files beside it, found {found}; fetch it again"
        )
    weights: Weights = {}
    for shard in sorted(set(weight_map.values())):  # only these: the folder may have shards of an earlier model
        tensors = read(index.parent / shard)
        for name in (name for name, home in weight_map.items() if home == shard and not is_buffer(name)):
            if name not in tensors:
                raise ModelFolderError(f"{index.parent / shard}: expected {name}, found no such tensor; fetch it again")
            weights[name] = tensors[name]
    return weights
