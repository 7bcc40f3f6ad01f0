"""The cache of a prompt on disk: its ids, keys and values.

The file is in safetensors format, valid for one model with its exact weights, and refused for any other.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import atomic_path
from mlx_gpt.generate.decoder import CacheState, Decoder
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.safetensors import check_safetensors, write_safetensors

KIND = "mlx_gpt prompt cache"


class PromptCache(NamedTuple):
    """The ids of a text, and the keys and values of every layer, one row, stored in ``bits``."""

    ids: list[int]
    state: CacheState
    bits: int | None


def save_prompt_cache(file: str | os.PathLike[str], decoder: Decoder, ids: list[int]) -> None:
    """Save the cache of a decoder's first row up to ``ids``, the beginning of its text. Raises ``OSError``."""
    file, n = Path(file), len(ids)
    arrays = {"ids": mx.array(ids)}
    for i, layer in enumerate(decoder.state()):
        for name, parts in zip(("keys", "values"), layer, strict=True):
            arrays |= {f"h.{i}.{name}.{j}": mx.contiguous(part[:1, :, :n]) for j, part in enumerate(parts)}
    metadata = {"kind": KIND, "model": fingerprint(decoder.model), "bits": str(decoder.bits or "")}
    with atomic_path(file) as hidden:
        write_safetensors(hidden, arrays, metadata)


def load_prompt_cache(file: str | os.PathLike[str], model: GPT) -> PromptCache:
    """Load a saved cache. Raises ``UsageError`` for another model's, ``ModelFolderError`` for a damaged file."""
    file = Path(file)
    check_safetensors(file)
    try:
        found: Any = mx.load(str(file), format="safetensors", return_metadata=True)
        mx.eval(found[0])
    except RuntimeError as error:
        raise ModelFolderError(f"{file}: expected a prompt cache, found a file MLX refuses ({error})") from error
    arrays, metadata = found
    if metadata.get("kind") != KIND:
        raise UsageError(f"{file}: expected what --save-prompt-cache wrote, found another safetensors file")
    if metadata["model"] != fingerprint(model):
        raise UsageError(f"{file}: this prompt was read by another model; save it again with --save-prompt-cache")
    tree: Any = tree_unflatten(list(arrays.items()))
    state = [(tuple(layer["keys"]), tuple(layer["values"])) for layer in tree["h"]]
    return PromptCache(tree["ids"].tolist(), state, int(metadata["bits"]) if metadata["bits"] else None)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256, in hex, of a model's configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {weight.shape}".encode())
        digest.update(np.array(mx.contiguous(weight).view(mx.uint8)).data)
    return digest.hexdigest()
