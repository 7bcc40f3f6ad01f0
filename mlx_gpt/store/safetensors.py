"""The tensors of a model folder: safetensors, whole or in shards, looked at closely before MLX reads them.

MLX is lazy: it reads the values when they are first needed, and takes a damaged file without a word.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import parse_json
from mlx_gpt.store.convert import Weights
from mlx_gpt.store.model_config import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 3_000_000  # bytes; a thousand layers take half of it. The format's own is 100 MB
METADATA = "__metadata__"
SHARD = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # a file beside the index, nowhere else

# Bytes of an element, for the dtypes of safetensors that MLX reads as they are.
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1}
ITEMSIZE |= {"U8": 1, "BOOL": 1}
KINDS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}  # to write


def has_safetensors(folder: Path) -> bool:
    """Whether weights lie in a folder as safetensors, whole or in shards."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def read_weights(folder: str | os.PathLike[str]) -> Weights:
    """The tensors of a folder as its files name them, lazily: MLX reads the values when they are first needed."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists():  # before an index, as transformers does
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return read_shards(folder / INDEX, _read_safetensors)
    raise ModelFolderError(f"{folder}: expected {WEIGHTS}, found no weights; fetch the folder again from where it came")


def read_shards(index: Path, read: Callable[[Path], Weights]) -> Weights:
    """The tensors that an index names, each from its shard."""
    weight_map: Any = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if wrong := [shard for shard in shards if not isinstance(shard, str) or not SHARD.fullmatch(shard)]:
        found = f"{wrong[0]!r:.80}" if weight_map else "none"
        raise ModelFolderError(
            f"{index}: expected a weight_map of tensors to files beside it, found {found}; fetch it again"
        )
    weights: Weights = {}
    for shard in sorted(set(weight_map.values())):  # only these: an earlier model's shards may lie beside them
        tensors = read(index.parent / shard)
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


def write_safetensors(
    file: Path, weights: Weights, metadata: dict[str, str], look: Callable[[mx.array, str], None] = lambda *_: None
) -> None:
    """Write tensors one after the other and forget each: lazy ones are in memory one at a time. Empties ``weights``.

    ``look`` sees each of them and its name before it is written.
    """
    entries = {name: (KINDS[weight.dtype], weight.shape, weight.nbytes) for name, weight in weights.items()}
    with file.open("wb") as stream:
        stream.write(safetensors_header(entries, metadata))
        for name in entries:
            weight = weights.pop(name)
            look(weight, name)
            stream.write(raw_bytes(weight))
            mx.clear_cache()  # or MLX keeps the memory for the next


def safetensors_header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """What stands in front of tensors that follow one after the other, each given as (kind, shape, bytes)."""
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    end = 0
    for name, (kind, shape, size) in entries.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def raw_bytes(weight: mx.array) -> memoryview:
    """The values of an array, row by row, as they lie in memory."""
    row_by_row = mx.view(mx.contiguous(weight), mx.uint8)
    mx.eval(row_by_row)
    return memoryview(row_by_row)  # type: ignore[arg-type]


def check_safetensors(file: Path) -> None:
    """Raise ``ModelFolderError`` unless the header is sound and the tensors fill the file to its last byte.

    MLX would read a file cut short or with overlapping tensors without a word. The format: 8 bytes of header length,
    a JSON header {name: {dtype, shape, data_offsets}}, the data (github.com/huggingface/safetensors, README).
    """
    try:
        about = file.stat()
        if stat.S_ISFIFO(about.st_mode):  # it would never end
            raise ModelFolderError(f"{file}: expected weights, found a pipe; give a file")
        size = about.st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header_bytes = stream.read(length) if 8 + length <= min(size, HEADER_LIMIT) else b""
    except OSError as error:
        raise ModelFolderError(f"{file}: expected weights, but cannot be read ({error.strerror})") from error
    if start == b"version ":
        raise ModelFolderError(f"{file}: expected weights, found a git-lfs pointer to them; run git lfs pull")
    if len(start) < 8 or 8 + length > size:
        raise _damaged(file, f"{size} bytes and no whole header in them")
    if len(header_bytes) < length:
        raise _damaged(file, f"a header of {length} bytes, where a thousand layers take {HEADER_LIMIT // 2}")
    try:
        tensors = [(name, *_entry(entry)) for name, entry in parse_json(header_bytes).items() if name != METADATA]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "a header that is none") from error
    end = 0
    for name, kind, n, begin, stop in sorted(tensors, key=lambda tensor: tensor[3:]):
        if kind not in ITEMSIZE:
            raise ModelFolderError(
                f"{file}: {name}: expected F32, F16 or BF16, found {kind}, which MLX does not read; "
                f"save the model again as float32"
            )
        if begin != end or stop - begin != n * ITEMSIZE[kind]:
            raise _damaged(file, f"{name} at bytes {begin} to {stop}, which does not fit its shape or neighbours")
        end = stop
    if 8 + length + end != size:
        raise _damaged(file, f"{size} bytes where its header promises {8 + length + end}")


def _entry(entry: dict[str, Any]) -> tuple[str, int, int, int]:
    """What a header says of a tensor: dtype, number of values, and the bytes it takes, from and to."""
    kind, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    # A bool or a float would pass for an int here and not in MLX, whose dimensions have 32 bits.
    if any(type(n) is not int for n in (*shape, begin, stop)) or not all(0 <= n < 2**31 for n in shape):
        raise ValueError(f"expected whole numbers, found {entry}")
    if not isinstance(kind, str):
        raise ValueError(f"expected the name of a dtype, found {kind}")
    return kind, prod(shape), begin, stop


def _damaged(file: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"{file}: expected a whole safetensors file, found {found}; fetch or save it again")
