"""The safetensors format: checked strictly before MLX reads a file, and written one tensor at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data
(github.com/huggingface/safetensors, README). MLX reads values lazily and accepts a damaged file without an error.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import parse_json
from mlx_gpt.store.convert import Weights

HEADER_LIMIT = 3_000_000  # bytes; a thousand layers need half of it. The format's own limit is 100 MB
METADATA = "__metadata__"

# Bytes per element of the dtypes that MLX reads unchanged.
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1}
ITEMSIZE |= {"U8": 1, "BOOL": 1}
WRITTEN = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}


def read_safetensors(file: Path) -> Weights:
    """Return the tensors of a file, lazily. Raises ``ModelFolderError`` for a damaged one.

    A name that the metadata give as another's, as ``safetensors.torch.save_model`` does, is that tensor as well.
    """
    aliases = check_safetensors(file)
    try:
        tensors = mx.load(str(file), format="safetensors")
    except RuntimeError as error:
        raise ModelFolderError(f"{file}: expected safetensors, found a file that MLX refuses ({error})") from error
    assert isinstance(tensors, dict)  # as this format always is
    return {name: tensors[kept] for name, kept in aliases.items() if kept in tensors} | tensors


def write_safetensors(
    file: Path, weights: Weights, metadata: dict[str, str], check: Callable[[mx.array, str], None] = lambda *_: None
) -> None:
    """Write tensors one by one and release each, so that lazy ones are in memory one at a time. Empties ``weights``.

    ``check`` is called with each tensor and its name before it is written. Raises ``OSError``.
    """
    entries = {name: (WRITTEN[weight.dtype], weight.shape, weight.nbytes) for name, weight in weights.items()}
    with file.open("wb") as stream:
        stream.write(safetensors_header(entries, metadata))
        for name in entries:
            weight = weights.pop(name)
            check(weight, name)
            stream.write(raw_bytes(weight))
            mx.clear_cache()  # or MLX keeps the memory for the next tensor


def safetensors_header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """Return the header of consecutive tensors, each given as (dtype, shape, bytes)."""
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def raw_bytes(weight: mx.array) -> memoryview:
    """Return the values of an array in row-major order, as bytes."""
    row_major = mx.view(mx.contiguous(weight), mx.uint8)
    mx.eval(row_major)
    return memoryview(row_major)  # type: ignore[arg-type]


def check_safetensors(file: Path) -> dict[str, str]:
    """Raise ``ModelFolderError`` unless the header is valid and the tensors fill the file; return its metadata."""
    size, start, header = _read_header(file)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise ModelFolderError(f"{file}: expected weights, found a git-lfs pointer to them; run git lfs pull")
    if len(start) < 8 or 8 + length > size:
        raise _damaged(file, f"{size} bytes without a whole header")
    if len(header) < length:
        raise _damaged(file, f"a header of {length} bytes, where a thousand layers take {HEADER_LIMIT // 2}")
    try:
        entries = parse_json(header)
        metadata = dict(entries.pop(METADATA, None) or {})  # MLX writes null
        tensors = [(name, *_parse_entry(entry)) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "an invalid header") from error
    end = 0
    for name, dtype, n, begin, stop in sorted(tensors, key=lambda tensor: tensor[3:]):
        if dtype not in ITEMSIZE:
            raise ModelFolderError(
                f"{file}: {name}: expected F32, F16 or BF16, found {dtype}, which MLX does not read; "
                f"save the model again as float32"
            )
        if begin != end or stop - begin != n * ITEMSIZE[dtype]:
            raise _damaged(file, f"{name} at bytes {begin} to {stop}, which does not fit its shape or neighbours")
        end = stop
    if 8 + length + end != size:
        raise _damaged(file, f"{size} bytes where its header promises {8 + length + end}")
    return {name: text for name, text in metadata.items() if isinstance(text, str)}


def _read_header(file: Path) -> tuple[int, bytes, bytes]:
    """Return the size of a file, its first 8 bytes, and its header; no header if it is too long or cut short."""
    try:
        about = file.stat()
        if stat.S_ISFIFO(about.st_mode):  # it would never end
            raise ModelFolderError(f"{file}: expected weights, found a pipe; give a file")
        with file.open("rb") as stream:
            start = stream.read(8)
            end = 8 + int.from_bytes(start, "little")
            return about.st_size, start, stream.read(end - 8) if end <= min(about.st_size, HEADER_LIMIT) else b""
    except OSError as error:
        raise ModelFolderError(f"{file}: expected weights, but cannot be read ({error.strerror})") from error


def _parse_entry(entry: dict[str, Any]) -> tuple[str, int, int, int]:
    """Return dtype, number of values, first byte and end of a header's entry. Raises ``ValueError``."""
    dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    # A bool or a float would pass as an int here but not in MLX, whose dimensions have 32 bits.
    if any(type(n) is not int for n in (*shape, begin, stop)) or not all(0 <= n < 2**31 for n in shape):
        raise ValueError(f"expected integers, found {entry}")
    if not isinstance(dtype, str):
        raise ValueError(f"expected the name of a dtype, found {dtype}")
    return dtype, prod(shape), begin, stop


def _damaged(file: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"{file}: expected a whole safetensors file, found {found}; fetch or save it again")
