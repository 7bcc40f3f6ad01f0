"""Load tensors of a memory-mapped file as MLX arrays, each copied once.

MLX reads safetensors from any Python object that behaves like a file. Behind a safetensors header, mapped tensors are
such a file, and MLX loads them in any dtype it knows. It reads all of them at once, not lazily, so the pages that have
been read are released: otherwise the weights would be in memory twice.
"""

from __future__ import annotations

import io
import mmap
import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights
from mlx_gpt.store.safetensors import safetensors_header

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}  # NumPy has no bfloat16: uint16 holds its bits


def mapped_arrays(tensors: Mapping[str, np.ndarray]) -> Weights:
    """Return NumPy views of a mapped file (float32, float16, or uint16 for bfloat16) as MLX arrays.

    Raises ``ModelFolderError`` if this machine cannot hold them: a sparse file states any size.
    """
    size, memory = sum(t.nbytes for t in tensors.values()), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ModelFolderError(
            f"the weights take {size / 1e9:,.1f} GB, but this machine has {memory / 1e9:,.1f} GB of memory; "
            f"convert them on a larger one, or use a smaller model"
        )
    header = safetensors_header({name: (DTYPES[t.dtype.name], t.shape, t.nbytes) for name, t in tensors.items()})
    arrays = mx.load(_Concatenated([header, *tensors.values()]), format="safetensors")  # type: ignore[arg-type]
    assert isinstance(arrays, dict)  # as this format always is
    return arrays


class _Concatenated(io.RawIOBase):
    """Buffers, in memory or mapped into it, read as one file."""

    def __init__(self, parts: list[Any]):
        super().__init__()
        self._parts = [np.frombuffer(part, np.uint8) for part in parts]
        self._maps = [_map_of(part) for part in parts]
        self._ends = list(accumulate(map(len, self._parts)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        i = bisect_right(self._ends, self._position)
        if i == len(self._parts):
            return 0
        rest = self._parts[i][self._position - self._ends[i] :]  # a negative index, from the end
        n = min(len(buffer), len(rest))
        np.frombuffer(buffer, np.uint8)[:n] = rest[:n]
        self._position += n
        if (mapped := self._maps[i]) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # the pages are read again if they are needed again
        return n


def _map_of(part: Any) -> mmap.mmap | None:
    """Return the mapped file behind an array. None unless it is read-only: released pages lose what was written."""
    if not isinstance(part, np.memmap) or part.flags.writeable:
        return None
    while part is not None and not isinstance(part, mmap.mmap):
        part = part.base
    return part
