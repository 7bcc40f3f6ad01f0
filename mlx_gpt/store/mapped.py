"""Tensors that lie in a file of another format, mapped into memory: MLX copies each to where it wants it.

MLX reads safetensors also from a Python object that only behaves like a file. So tensors that lie elsewhere get a
safetensors header, and MLX finds each of them behind it, in any dtype it knows. It reads them all at once then, not
each when it is needed: so what has been read of a mapped file is let go, or the weights would be in memory twice.
"""

from __future__ import annotations

import io
import mmap
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.store.convert import Weights
from mlx_gpt.store.safetensors import safetensors_header

KINDS = {"float32": "F32", "float16": "F16", "uint16": "BF16"}  # NumPy has no bfloat16: here uint16 holds its bits


def mapped_arrays(tensors: Mapping[str, np.ndarray]) -> Weights:
    """NumPy views of a mapped file (float32, float16, or uint16 for bfloat16) as MLX arrays."""
    header = safetensors_header({name: (KINDS[t.dtype.name], t.shape, t.nbytes) for name, t in tensors.items()})
    arrays = mx.load(_OneAfterTheOther([header, *tensors.values()]), format="safetensors")  # type: ignore[arg-type]
    assert isinstance(arrays, dict)  # as this format always is
    return arrays


class _OneAfterTheOther(io.RawIOBase):
    """Parts in memory, or mapped into it, as one file."""

    def __init__(self, parts: list[Any]):
        super().__init__()
        self._parts = [np.frombuffer(part, np.uint8) for part in parts]
        self._maps = [_map_of(part) for part in parts]
        self._ends = list(accumulate(map(len, self._parts)))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        i = bisect_right(self._ends, self._at)
        if i == len(self._parts):
            return 0
        left = self._parts[i][self._at - self._ends[i] :]  # counted from its end
        n = min(len(buffer), len(left))
        np.frombuffer(buffer, np.uint8)[:n] = left[:n]
        self._at += n
        if (mapped := self._maps[i]) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # its pages: they are read again if somebody looks at them again
        return n


def _map_of(part: Any) -> mmap.mmap | None:
    """The mapped file that an array is a view of, if it is read only: else letting go would lose what was written."""
    if not isinstance(part, np.memmap) or part.flags.writeable:
        return None
    while part is not None and not isinstance(part, mmap.mmap):
        part = part.base
    return part
