"""TensorFlow's checkpoint format, a *tensor bundle*, read with NumPy alone.

The values are consecutive in ``NAME.data-00000-of-00001``, their offsets are in ``NAME.index`` (tensorflow,
``core/util/tensor_bundle/tensor_bundle.h``). The index is a LevelDB table (github.com/google/leveldb,
``doc/table_format.md``): blocks of sorted keys, each key stored as its difference from the previous one, and a footer
of 48 bytes that locates the index of the blocks. A key is a variable's name, its value a ``BundleEntryProto``: dtype,
shape, shard, offset and size as a protobuf message.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import read_small
from mlx_gpt.store.crc32c import crc32c

FOOTER, MAGIC = 48, 0xDB4775248B80FB57
LIMIT = 3_000_000  # bytes of an index; GPT-2 XL's 580 variables take a hundredth of it
MASK_DELTA = 0xA282EAD8  # LevelDB's offset for stored checksums
DTYPES = {1: "<f4", 14: "<u2", 19: "<f2"}  # DT_FLOAT, DT_BFLOAT16, DT_HALF (tensorflow, core/framework/types.proto)
CHECKSUM = 6  # the field of a BundleEntryProto; 3, 4, 5 are its place
Message = dict[int, list[Any]]  # a protobuf message: field number -> its values


def read_bundle(index: Path) -> dict[str, np.ndarray]:
    """Return the floating-point variables of a checkpoint, mapped into memory, their checksums compared.

    Raises ``ModelFolderError``.
    """
    try:
        entries = {key.decode(): protobuf(value) for key, value in entries_of(read_small(index, LIMIT))}
        n_shards = entries.pop("")[1][0]  # BundleHeaderProto: 1 number of shards
        shards = (f"{index.stem}.data-{i:05}-of-{n_shards:05}" for i in range(n_shards))
        data = [_map_file(index.with_name(shard)) for shard in shards]
        _check_ends(entries, data)
        floats = {name: entry for name, entry in entries.items() if entry[1][0] in DTYPES}
        return {name: _read_variable(name, entry, data) for name, entry in floats.items()}
    except OSError as error:
        raise ModelFolderError(
            f"{error.filename or index}: cannot be read ({error.strerror}); copy the whole release"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{index}: expected a TensorFlow checkpoint, found something else or damage ({error}); copy the whole "
            f"release again"
        ) from error


def _map_file(file: Path) -> np.ndarray:
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "not a file but a folder, a device or a pipe", str(file))
    return np.memmap(file, np.uint8, "r")


def _check_ends(entries: dict[str, Message], data: Sequence[np.ndarray]) -> None:
    """Raise ``ValueError`` unless the last variable of a shard ends with it: inserted bytes would shift the others."""
    ends = [0] * len(data)
    for shard, offset, size in map(place, entries.values()):
        ends[shard] = max(ends[shard], offset + size)
    for shard, (end, values) in enumerate(zip(ends, data, strict=True)):
        if len(values) > end:
            raise ValueError(f"{len(values)} bytes in shard {shard}, of which {end} are used")


def place(entry: Message) -> list[int]:
    """Return shard (3), offset (4) and size (5) of a BundleEntryProto, which omits zeros."""
    return [entry.get(field, [0])[0] for field in (3, 4, 5)]


def _read_variable(name: str, entry: Message, data: Sequence[np.ndarray]) -> np.ndarray:
    """Return the values of a BundleEntryProto: 1 dtype, 2 shape, its place and checksum."""
    shard, offset, size = place(entry)
    dims = [protobuf(dim) for dim in protobuf(entry[2][0]).get(2, [])]
    shape = tuple(dim.get(1, [0])[0] for dim in dims)
    dtype = np.dtype(DTYPES[entry[1][0]])
    if max(shape, default=0) >= 2**31:  # MLX's dimensions have 32 bits
        raise ValueError(f"{name} of shape {shape}")
    if offset + size > len(data[shard]) or size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} at bytes {offset} to {offset + size} of {len(data[shard])}")
    values = data[shard][offset : offset + size]
    if CHECKSUM in entry and masked(crc32c(values)) != entry[CHECKSUM][0]:
        raise ValueError(f"{name} with a wrong checksum")
    return values.view(dtype).reshape(shape)


# LevelDB tables and protobuf messages, as far as a checkpoint needs them ----------------------------------------------


def entries_of(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a LevelDB table."""
    if len(table) < FOOTER or int.from_bytes(table[-8:], "little") != MAGIC:
        raise ValueError("found no such table")
    (_, _, offset, size), _ = read_varints(table[-FOOTER:], 4)  # the handles of the metaindex and index blocks
    end = 0
    for _, handle in read_block(table, offset, size):
        (offset, size), _ = read_varints(handle, 2)
        if offset < end:
            raise ValueError("found blocks that overlap")
        yield from read_block(table, offset, size)
        end = offset + size


def read_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    An entry is three lengths (bytes shared with the previous key, further bytes, bytes of the value), then both. The
    block is followed by its type, 0 if it is not compressed, and a checksum of both.
    """
    if table[offset + size] != 0:
        raise ValueError("found compressed blocks")
    content = table[offset : offset + size]
    if int.from_bytes(table[offset + size + 1 : offset + size + 5], "little") != masked(crc32c(content + b"\0")):
        raise ValueError("found a block with a wrong checksum")
    n_restarts = int.from_bytes(content[-4:], "little")
    at, end, key = 0, size - 4 * (n_restarts + 1), b""
    while at < end:
        (shared, n_key, n_value), at = read_varints(content, 3, at)
        key = key[:shared] + content[at : at + n_key]
        yield key, content[at + n_key : at + n_key + n_value]
        at += n_key + n_value


def masked(crc: int) -> int:
    """Return a checksum as LevelDB stores it: rotated right by 15 bits, plus a constant (``util/crc32c.h``)."""
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def protobuf(message: bytes) -> Message:
    """Return the fields of a protobuf message by number, as integers or bytes."""
    fields: Message = {}
    at = 0
    while at < len(message):
        (tag,), at = read_varints(message, 1, at)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == 0:
            (value,), at = read_varints(message, 1, at)
        elif wire_type == 2:
            (length,), at = read_varints(message, 1, at)
            value, at = message[at : at + length], at + length
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
            value, at = int.from_bytes(message[at : at + length], "little"), at + length
        else:
            raise ValueError(f"found a field of wire type {wire_type}")
        fields.setdefault(number, []).append(value)
    return fields


def read_varints(data: bytes, n: int, at: int = 0) -> tuple[list[int], int]:
    """Return ``n`` numbers and where they end; 7 bits a byte, lowest first, the top bit set in all but the last."""
    numbers = []
    for _ in range(n):
        number, shift = 0, 0
        while True:
            byte = data[at]
            number |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
            if shift > 63:
                raise ValueError("found a number of more than 64 bits")
        numbers.append(number)
    return numbers, at
