"""A model's products with few rows, as fast as the memory gives the weights.

Decoding multiplies every matrix with one row, or a few, and so takes as long as it takes to read the matrices. A GPU
does that well by itself. On a CPU MLX calls a BLAS, and OpenBLAS copies a matrix before it multiplies, unless the
product is small, or has one row and is passed on by ``blas.py``. So on a CPU a matrix is read as blocks of rows, which
make small products, and the blocks are shared among the cores, each with a stream of its own. The weights stay where
they are.
"""

from __future__ import annotations

import copy
import threading
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.blas import reads_in_place, set_threads
from mlx_gpt.device import cores, on_cpu

FEW = 16  # rows; with more, a product computes more than it reads
SMALL = 1_000_000  # multiplications up to which OpenBLAS does not copy (its sgemm for small matrices, x86-64)
SHARE = 2 << 20  # bytes of a matrix that are worth a core: less takes no longer than waiting for another core

_of_this_thread = threading.local()


def for_few_rows(module: nn.Module) -> Any:
    """On a CPU, the same module over the same weights, with products for few rows; on a GPU, the module itself."""
    if not on_cpu():
        return module
    twin = copy.copy(module)
    for name, child in module.items():
        if type(child) is nn.Linear:  # and not quantized, for one
            twin[name] = Product(child.weight, child.get("bias"))
        elif type(child) is nn.Embedding:
            twin[name] = Embedding(child.weight)
        elif isinstance(child, nn.Module):
            twin[name] = for_few_rows(child)
        elif isinstance(child, list):
            twin[name] = [for_few_rows(item) for item in child]
    return twin


class Product:
    """``x @ weight.T + bias`` as ``nn.Linear`` has it: weight (N, K), bias (N,) or none; (..., K) -> (..., N)."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None):
        self.weight = weight
        self.bias = bias
        self._cut: dict[int, list[mx.array]] = {}  # number of rows -> the weight, cut for so many

    def __call__(self, x: mx.array) -> mx.array:
        N, K = self.weight.shape
        rows = x.size // K
        if rows not in self._cut:
            self._cut[rows] = cut(self.weight, rows)
        parts = self._cut[rows]
        if parts[0].ndim == 2:
            return x @ parts[0] if self.bias is None else mx.addmm(self.bias, x, parts[0])
        x_rows, streams = x.reshape(1, rows, K), lanes()
        products = [_multiply(x_rows, part, streams[i % len(streams)]) for i, part in enumerate(parts)]
        y = mx.concatenate(products, axis=-1).reshape(*x.shape[:-1], N)
        return y if self.bias is None else y + self.bias


class Embedding:
    """Embeddings, (V, C), by which the head multiplies too, where it is tied."""

    def __init__(self, weight: mx.array):
        self.weight = weight
        self.as_linear = Product(weight)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[ids]


def cut(weight: mx.array, rows: int) -> list[mx.array]:
    """A matrix (N, K), transposed and cut for products with so many rows; views, no copies.

    (K, N) where that is one small product, or where many rows, or one, leave nothing to gain. Else (n, K, r), n blocks
    of r rows, for each core, and what is left over.
    """
    N, K = weight.shape
    r = SMALL // (rows * K)
    if rows > FEW or r >= N or not r or (rows == 1 and reads_in_place()):
        parts = [weight.T]
    else:
        r = 1 << (r.bit_length() - 1)  # powers of two divide most widths
        n = N // r
        shares = max(1, min(len(lanes()), n, weight.nbytes // SHARE))
        ends = [n * i // shares * r for i in range(shares + 1)]
        parts = [weight[a:b].reshape(-1, r, K).swapaxes(1, 2) for a, b in pairwise(ends)]
        if ends[-1] < N:
            parts.append(weight[None, ends[-1] :].swapaxes(1, 2))
    mx.eval(parts)
    return parts


def lanes() -> list[mx.Stream]:
    """A stream for each core, the first of them the default one."""
    if not hasattr(_of_this_thread, "lanes"):
        set_threads(1)  # a core has a lane already: threads of OpenBLAS besides would wait for each other
        more = [mx.new_stream(mx.Device(mx.cpu)) for _ in range(cores() - 1)]
        _of_this_thread.lanes = [mx.default_stream(mx.Device(mx.cpu)), *more]
    return _of_this_thread.lanes


def _multiply(x: mx.array, blocks: mx.array, lane: mx.Stream) -> mx.array:
    """(1, rows, K) with (n, K, r) -> (rows, n r)."""
    with mx.stream(lane):
        return (x @ blocks).swapaxes(0, 1).reshape(x.shape[1], -1)
