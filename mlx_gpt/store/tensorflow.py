"""OpenAI's own release of GPT-2, for TensorFlow 1: ``hparams.json`` and a checkpoint, read with NumPy alone.

A checkpoint is a *tensor bundle* (tensorflow, ``core/util/tensor_bundle/tensor_bundle.h``): the values one after the
other in ``model.ckpt.data-00000-of-00001``, and where each begins in ``model.ckpt.index``. The index is a table of
LevelDB's (github.com/google/leveldb, ``doc/table_format.md``): blocks of sorted keys, each key written as what differs
from the one before it; the last 48 bytes say where the index of the blocks is. A key is a variable's name, its value
a ``BundleEntryProto``, which says type, shape, shard, offset and size in protobuf's numbers.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import read_small
from mlx_gpt.store.convert import Weights
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.model_config import read_json

HPARAMS = "hparams.json"
OURS = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
FOOTER, MAGIC = 48, 0xDB4775248B80FB57
LIMIT = 3_000_000  # bytes of an index; GPT-2 XL's 580 variables take a hundredth of it
CRC32C, MASK = 0x82F63B78, 0xA282EAD8  # the polynomial, bits reversed; what LevelDB adds to a checksum it writes
TYPES = {1: "<f4", 14: "<u2", 19: "<f2"}  # DT_FLOAT, DT_BFLOAT16, DT_HALF (tensorflow, core/framework/types.proto)
LAST = {"w": "weight", "g": "weight", "b": "bias"}  # model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight
Entry = dict[int, list[Any]]  # a message of protobuf's: number of a field -> its values
SLOT = re.compile(r".*/Adam(_\d+)?")  # what an optimizer keeps beside a variable


def read_tensorflow(folder: Path) -> tuple[GPTConfig, Weights]:
    """The settings and, lazily, the tensors of a folder in the hub's layout, by the hub's names."""
    hparams = read_json(folder / HPARAMS)
    if hparams.keys() != OURS.keys():
        odd = sorted(hparams.keys() ^ OURS.keys())[0]
        trouble = "is a setting of another model" if odd in hparams else "is missing"
        raise ModelFolderError(f"{folder / HPARAMS}: {odd} {trouble}; expected {', '.join(OURS)}")
    try:
        config = GPTConfig(**{OURS[name]: value for name, value in hparams.items()})
    except UsageError as error:
        raise ModelFolderError(f"{folder / HPARAMS}: {error}") from error
    variables = read_bundle(checkpoint_in(folder))
    tensors = {
        hub_name(name): value[0] if value.ndim == 3 else value  # a matrix was a convolution of width 1
        for name, value in variables.items()
        if name.startswith("model/") and not SLOT.fullmatch(name)
    }
    return config, mapped_arrays(tensors)


def hub_name(variable: str) -> str:
    """``model/h0/attn/c_attn/w`` -> ``h.0.attn.c_attn.weight``, ``model/wte`` -> ``wte.weight``."""
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", variable.removeprefix("model/")).split("/")
    return ".".join([*path, LAST[last]] if last in LAST else [*path, last, "weight"])


def checkpoint_in(folder: Path) -> Path:
    """The index of the checkpoint that the file ``checkpoint`` names, or else of the only one."""
    indices = sorted(folder.glob("*.index"))
    note = folder / "checkpoint"
    try:
        text = read_small(note, LIMIT).decode("utf-8", "replace") if note.exists() else ""
    except OSError as error:
        raise ModelFolderError(f"{note}: cannot be read ({error.strerror}); remove it") from error
    named = re.search(r'^model_checkpoint_path: "(.*)"', text)
    chosen = [file for file in indices if named and file.stem == Path(named[1]).name] or indices
    if len(chosen) != 1:
        raise ModelFolderError(
            f"{folder}: expected one TensorFlow checkpoint, model.ckpt.index, found {len(chosen)}; "
            f"copy all files of the release into one folder"
        )
    return chosen[0]


def read_bundle(index: Path) -> dict[str, np.ndarray]:
    """Every variable of floats in a checkpoint, mapped into memory."""
    try:
        table = read_small(index, LIMIT)
        entries = {key.decode(): protobuf(value) for key, value in entries_of(table)}
        n_shards = entries.pop("")[1][0]  # BundleHeaderProto: 1 number of shards
        shards = (f"{index.stem}.data-{i:05}-of-{n_shards:05}" for i in range(n_shards))
        data = [mapped(index.with_name(shard)) for shard in shards]
        check_ends(entries, data)
        floats = {name: entry for name, entry in entries.items() if entry[1][0] in TYPES}
        return {name: _variable(name, entry, data) for name, entry in floats.items()}
    except OSError as error:
        raise ModelFolderError(
            f"{error.filename or index}: cannot be read ({error.strerror}); copy all of the release"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{index}: expected a TensorFlow checkpoint, found something else or damage ({error}); copy all of the "
            f"release again"
        ) from error


def mapped(file: Path) -> np.ndarray:
    """The bytes of a file, each read when it is needed."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no file but a folder, a device or a pipe", str(file))
    return np.memmap(file, np.uint8, "r")


def check_ends(entries: dict[str, Entry], data: Sequence[np.ndarray]) -> None:
    """The last variable of each shard ends where the shard ends: bytes that came in between have moved the others."""
    ends = [0] * len(data)
    for shard, offset, size in map(place, entries.values()):
        ends[shard] = max(ends[shard], offset + size)
    for shard, (end, values) in enumerate(zip(ends, data, strict=True)):
        if len(values) > end:
            raise ValueError(f"{len(values)} bytes in shard {shard}, of which {end} are used")


def place(entry: Entry) -> list[int]:
    """Of a variable: 3 shard, 4 offset, 5 size. What is 0 is left out."""
    return [entry.get(field, [0])[0] for field in (3, 4, 5)]


def _variable(name: str, entry: Entry, data: Sequence[np.ndarray]) -> np.ndarray:
    """BundleEntryProto: 1 type, 2 shape, and its ``place``."""
    shard, offset, size = place(entry)
    dims = [protobuf(dim) for dim in protobuf(entry[2][0]).get(2, [])]
    shape = tuple(dim.get(1, [0])[0] for dim in dims)
    kind = np.dtype(TYPES[entry[1][0]])
    if max(shape, default=0) >= 2**31:  # MLX's dimensions have 32 bits
        raise ValueError(f"{name} of shape {shape}")
    if offset + size > len(data[shard]) or size != prod(shape) * kind.itemsize:
        raise ValueError(f"{name} of shape {shape} at bytes {offset} to {offset + size} of {len(data[shard])}")
    return data[shard][offset : offset + size].view(kind).reshape(shape)


# LevelDB and protobuf, as little of them as this takes ----------------------------------------------------------------


def entries_of(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table."""
    if len(table) < FOOTER or int.from_bytes(table[-8:], "little") != MAGIC:
        raise ValueError("found no such table")
    _, _, offset, size = varints(table[-FOOTER:], 4)  # a block of other things, then the block of blocks
    end = 0
    for _, handle in block(table, offset, size):
        offset, size = varints(handle, 2)
        if offset < end:
            raise ValueError("found blocks that overlap")
        yield from block(table, offset, size)
        end = offset + size


def block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block: (bytes shared with the last key, others, bytes of the value), then both.

    Behind it stand its kind, 0 if it is not compressed, and a checksum of both.
    """
    if table[offset + size] != 0:
        raise ValueError("found compressed blocks")
    content = table[offset : offset + size]
    if int.from_bytes(table[offset + size + 1 : offset + size + 5], "little") != masked(crc32c(content + b"\0")):
        raise ValueError("found a block that its checksum is not of")
    n_restarts = int.from_bytes(content[-4:], "little")
    at, end, key = 0, size - 4 * (n_restarts + 1), b""
    while at < end:
        (shared, n_key, n_value), at = read_varints(content, 3, at)
        key = key[:shared] + content[at : at + n_key]
        yield key, content[at + n_key : at + n_key + n_value]
        at += n_key + n_value


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, byte by byte (github.com/google/leveldb, ``util/crc32c.cc``)."""
    crc, table = 0xFFFFFFFF, crc_of_bytes()
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@lru_cache(1)
def crc_of_bytes() -> list[int]:
    """What each of the 256 bytes does to a checksum."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (CRC32C if crc & 1 else 0) for crc in table]
    return table


def masked(crc: int) -> int:
    """A checksum as it is written (``util/crc32c.h``): turned by 15 bits, and a constant more."""
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def protobuf(message: bytes) -> Entry:
    """The fields of a message by their numbers: whole numbers, or bytes."""
    fields: Entry = {}
    at = 0
    while at < len(message):
        (tag,), at = read_varints(message, 1, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            (value,), at = read_varints(message, 1, at)
        elif wire == 2:
            (length,), at = read_varints(message, 1, at)
            value, at = message[at : at + length], at + length
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            value, at = int.from_bytes(message[at : at + length], "little"), at + length
        else:
            raise ValueError(f"found a field of kind {wire}")
        fields.setdefault(number, []).append(value)
    return fields


def varints(data: bytes, n: int) -> list[int]:
    return read_varints(data, n, 0)[0]


def read_varints(data: bytes, n: int, at: int) -> tuple[list[int], int]:
    """``n`` numbers, each in bytes of 7 bits, the lowest first, all but the last marked; and where they end."""
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
