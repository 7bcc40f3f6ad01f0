"""The cache of a prompt on disk: its ids, keys and values.

The file is in safetensors format, valid for one model with its exact weights and tokenizer, and refused for any other.
Its metadata hold a hash of the model and one of the arrays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import atomic_path
from mlx_gpt.generate.decoder import CacheState, Decoder, check_cache
from mlx_gpt.model.cache import KVCache, Packed
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.safetensors import check_safetensors, raw_bytes, write_safetensors
from mlx_gpt.text.tokenizer import Tokenizer

KIND = "mlx_gpt prompt cache"


class PromptCache(NamedTuple):
    """The ids of a text, and the keys and values of every layer, one row, stored in ``bits``."""

    ids: list[int]
    state: CacheState
    bits: int | None


def save_prompt_cache(file: str | os.PathLike[str], decoder: Decoder, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Save the cache of a decoder's first row up to ``ids``, the beginning of its text. Raises ``OSError``."""
    arrays = _named(mx.array(ids, mx.int32), decoder.state())
    metadata = {"kind": KIND, "model": fingerprint(decoder.model, tokenizer), "bits": str(decoder.bits or "")}
    metadata["sha256"] = hash_of(arrays)
    with atomic_path(Path(file)) as hidden:
        write_safetensors(hidden, arrays, metadata)


def load_prompt_cache(file: str | os.PathLike[str], model: GPT, tokenizer: Tokenizer) -> PromptCache:
    """Load a saved cache. Raises ``UsageError`` for another model's, ``ModelFolderError`` for a damaged file."""
    file = Path(file)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "something else" if file.exists() else "no such file"
        raise ModelFolderError(f"{file}: expected a prompt cache, found {what}; save one with --save-prompt-cache")
    check_safetensors(file)
    try:
        found: Any = mx.load(str(file), format="safetensors", return_metadata=True)
        mx.eval(found[0])
    except RuntimeError as error:
        raise ModelFolderError(f"{file}: expected a prompt cache, found a file MLX refuses ({error})") from error
    arrays, metadata = found
    if metadata.get("kind") != KIND:
        raise UsageError(f"{file}: expected what --save-prompt-cache wrote, found another safetensors file")
    if metadata.get("model") != fingerprint(model, tokenizer):
        raise UsageError(
            f"{file}: this prompt was read by another model or tokenizer; save it again with --save-prompt-cache"
        )
    try:
        return _checked(arrays, metadata, model)
    except ValueError as error:
        raise ModelFolderError(
            f"{file}: expected a whole prompt cache, found {error}; save it again with --save-prompt-cache"
        ) from error


def _checked(arrays: dict[str, mx.array], metadata: Mapping[str, str], model: GPT) -> PromptCache:
    """Return the cache; ``ValueError`` unless names, shapes, types, ids and numbers can be those of this model."""
    stored = metadata.get("bits")
    if stored not in ("", "16", "8", "4"):
        raise ValueError(f"cache-bits of {stored!r}")
    bits = int(stored) if stored else None
    ids = arrays.get("ids", mx.array([]))
    if ids.ndim != 1 or ids.dtype != mx.int32 or not 0 < ids.size <= model.config.n_positions:
        raise ValueError(f"ids of shape {ids.shape} and {ids.dtype}")
    if not mx.all((ids >= 0) & (ids < model.config.vocab_size)).item():
        raise ValueError(f"ids that are not between 0 and {model.config.vocab_size - 1}")
    expected = _named(ids, [_zeros(model, bits, ids.size)] * model.config.n_layer)
    for name in sorted(expected.keys() | arrays.keys()):
        given, wanted = (
            f"{x.dtype} of shape {x.shape}" if x is not None else "no such array"
            for x in (arrays.get(name), expected.get(name))
        )
        if given != wanted:
            raise ValueError(f"{name}: {given}, not {wanted}")
        if mx.issubdtype(arrays[name].dtype, mx.floating) and not mx.all(mx.isfinite(arrays[name])).item():
            raise ValueError(f"{name}: nan or an infinity")
    if metadata.get("sha256") != hash_of(arrays):
        raise ValueError("other numbers than were saved")
    tree: Any = tree_unflatten(list(arrays.items()))
    return PromptCache(tree["ids"].tolist(), [(tuple(h["keys"]), tuple(h["values"])) for h in tree["h"]], bits)


def _named(ids: mx.array, state: CacheState) -> dict[str, mx.array]:
    """Return the arrays of a file by name: the ids, (n,), and keys and values of the first row up to n."""
    arrays = {"ids": ids}
    for i, layer in enumerate(state):
        for name, parts in zip(("keys", "values"), layer, strict=True):
            arrays |= {f"h.{i}.{name}.{j}": mx.contiguous(x[:1, :, : ids.size]) for j, x in enumerate(parts)}
    return arrays


def _zeros(model: GPT, bits: int | None, n: int) -> tuple[Packed, Packed]:
    """Return keys and values of a layer for n tokens, in the shapes and types in which this model's are stored."""
    check_cache(model.config, bits)
    cache = KVCache(n, bits)
    x = mx.zeros((1, model.config.n_head, n, model.config.head_dim), model.wpe.weight.dtype)
    cache.extend(x, x)
    return cache.keys, cache.values


def fingerprint(model: nn.Module, tokenizer: Tokenizer) -> str:
    """Return the SHA-256, in hex, of a model's configuration and weights, and of its tokenizer."""
    return hash_of(dict(tree_flatten(model.parameters())), f"{model.config!r} {tokenizer.hash}")


def hash_of(arrays: Mapping[str, mx.array], more: str = "") -> str:
    """Return the SHA-256, in hex, of arrays with their names, types and shapes, and of a text."""
    digest = hashlib.sha256(more.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()
