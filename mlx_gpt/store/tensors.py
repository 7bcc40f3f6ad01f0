"""The tensors of a model folder: safetensors, whole or in shards, looked at closely before MLX reads them.

MLX is lazy: it reads the values when they are first needed, and takes a damaged file without a word.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights
from mlx_gpt.store.settings import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes, the format's own

# Bytes of an element, for the dtypes of safetensors that MLX reads as they are.
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1}
ITEMSIZE |= {"U8": 1, "BOOL": 1}


def read_weights(folder: str | os.PathLike[str]) -> Weights:
    """The tensors of a folder as its files name them, lazily: MLX reads the values when they are first needed."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists():  # before an index, as transformers does
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return _read_shards(folder / INDEX)
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    raise ModelFolderError(
        f"{folder}: expected {WEIGHTS}, found {pickles[0] if pickles else 'no weights'}; weights in "
        f"pytorch_model.bin are a pickle, which can run code when opened: have transformers write them as "
        f"safetensors, GPT2LMHeadModel.from_pretrained(name).save_pretrained(folder)"
    )


def _read_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(s, str) and Path(s).name == s for s in weight_map.values()
    ):
        raise ModelFolderError(f"{index}: expected a weight_map of tensor to file name, found none; fetch it again")
    weights: Weights = {}
    for shard in sorted(set(weight_map.values())):  # only these: an earlier model's shards may lie beside them
        tensors = _read_safetensors(index.parent / shard)
        for name in (name for name, home in weight_map.items() if home == shard):
            if name not in tensors:
                raise ModelFolderError(f"{index.parent / shard}: expected {name}, found no such tensor; fetch it again")
            weights[name] = tensors[name]
    return weights


def _read_safetensors(file: Path) -> Weights:
    check_safetensors(file)
    try:
        tensors = mx.load(str(file), format="safetensors")
    except RuntimeError as error:
        raise ModelFolderError(f"{file}: expected safetensors, found a file MLX refuses ({error})") from error
    assert isinstance(tensors, dict)  # as this format always is
    return tensors


def check_safetensors(file: Path) -> None:
    """Raise ``ModelFolderError`` unless the header is sound and the tensors fill the file to its last byte.

    MLX would read a file cut short or with overlapping tensors without a word. The format: 8 bytes of header length,
    a JSON header {name: {dtype, shape, data_offsets}}, the data (github.com/huggingface/safetensors, README).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header_bytes = stream.read(length) if 8 + length <= min(size, HEADER_LIMIT) else b""
    except OSError as error:
        raise ModelFolderError(f"{file}: expected weights, but cannot be read ({error.strerror})") from error
    if start == b"version ":
        raise ModelFolderError(f"{file}: expected weights, found a git-lfs pointer to them; run git lfs pull")
    if len(start) < 8 or len(header_bytes) < length:
        raise _damaged(file, f"{size} bytes and no whole header in them")
    try:
        header = json.loads(header_bytes)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in ITEMSIZE:
                raise ModelFolderError(
                    f"{file}: {name}: expected F32, F16 or BF16, found {entry['dtype']}, which MLX does not read; "
                    f"save the model again as float32"
                )
            begin, stop = entry["data_offsets"]
            if begin != end or stop - begin != prod(entry["shape"]) * ITEMSIZE[entry["dtype"]]:
                raise _damaged(file, f"{name} at bytes {begin} to {stop}, which does not fit its shape or neighbours")
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, "a header that is none") from error
    if 8 + length + end != size:
        raise _damaged(file, f"{size} bytes where its header promises {8 + length + end}")


def _damaged(file: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"{file}: expected a whole safetensors file, found {found}; fetch or save it again")
