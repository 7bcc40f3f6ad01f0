"""The data of a living page: config, tokenizer and weights, from which its JavaScript computes what Python computes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from zlib import DEFLATED, MAX_WBITS, compressobj

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.weights import dense_weight, n_weights
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import write_name


def living_data(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], name: str) -> dict[str, Any]:
    """Return the data of a living page as an object for JSON. The weights are rounded to float16.

    Raises ``UsageError`` for weights that float16 cannot hold.
    """
    return {
        "kind": "living",
        "name": name,
        "parameters": n_weights(model),
        "config": {**asdict(model.config), "inner_dim": model.config.inner_dim},
        "tokenizer": tokenizer_data(tokenizer),
        "texts": [*texts],
        **packed(half_weights(model)),
    }


def half_weights(model: GPT) -> dict[str, np.ndarray]:
    """Return the weights by the hub's names, dequantized, as float16; linear layers' are (out, in)."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    weights = {}
    for path, array in parameters.items():
        layer, _, kind = path.rpartition(".")
        if kind not in ("scales", "biases"):  # of a quantized layer
            weights[path] = as_half(path, dense_weight(modules[layer]) if kind == "weight" else array)
    return weights


def as_half(name: str, array: mx.array) -> np.ndarray:
    """Return an array as float16, or raise ``UsageError`` if it has numbers that are too large."""
    with np.errstate(over="ignore"):
        half = np.array(array.astype(mx.float32)).astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(
            f"{name} has numbers that are no float16 (above 65,504, or NaN), so no page can compute with it"
        )
    return half


def tokenizer_data(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what ``js/tokenizer.js`` encodes with."""
    settings = tokenizer.settings
    if isinstance(tokenizer, CharacterTokenizer):
        return {"kind": "characters", "characters": [*tokenizer.ids], "start": tokenizer.start_id}
    names: list[str | None] = [None] * (max(tokenizer.ranks.values()) + 1)
    for token, i in tokenizer.ranks.items():
        names[i] = write_name(token)
    return {
        "kind": "bpe",
        "tokens": names,
        "specials": tokenizer.specials,
        "added": [{"text": token.text, "id": token.id, **token.flags} for token in settings.added],
        "prefix": settings.prefix,
        "suffix": settings.suffix,
        "opening": tokenizer.opening,
        "ends": settings.ends,
        "start": settings.start,
        "add_prefix_space": settings.add_prefix_space,
    }


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return ``tensors``, the shape, type and place of each array, and ``blob``, their bytes: deflated, as base64."""
    tensors, parts, offset = {}, [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        parts.append(data + bytes(-len(data) % 4))
        tensors[name] = {"shape": array.shape, "dtype": array.dtype.name, "offset": offset}
        offset += len(parts[-1])
    deflate = compressobj(9, DEFLATED, -MAX_WBITS)
    return {"tensors": tensors, "blob": b64encode(deflate.compress(b"".join(parts)) + deflate.flush()).decode()}
