"""MLX's graph of a computation: its operations with their types, and the kernels that Metal would launch for it.

Nothing is computed. The counts are from the graph after ``mx.compile`` has fused it, with Metal's launches for each
operation as in MLX's source; copies that a kernel makes of strided inputs are not counted.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

# Metal launches nothing for these: views, constants that are passed by value, and what only orders or wraps.
FREE = {
    *(
        "Reshape",
        "Flatten",
        "Unflatten",
        "Transpose",
        "Squeeze",
        "ExpandDims",
        "Broadcast",
        "BroadcastAxes",
        "AsStrided",
    ),
    *("Slice", "Split", "StopGradient", "Depends", "CustomTransforms", "Copy", "NumberOfElements"),
}
# backend/gpu/primitives.cpp: a copy of the array, unless its memory is donated, and of the new part; the offset in an
# array takes one more. While a step is in flight its arrays are held, so that the next step copies them.
LAUNCHES = {"DynamicSliceUpdate": 3, "SliceUpdate": 2, "DynamicSlice": 2, "Concatenate": 2}
BUFFERS = 31  # that a kernel of Metal can take
FIXED_BUFFERS = 3  # of a compiled kernel besides its arrays: strides, shape, size (backend/metal/compiled.cpp)
NOT_ON_METAL = {"QRF", "SVD", "Inverse", "Cholesky", "Eigh", "Eig", "LUF"}


class Operation(NamedTuple):
    """An operation with the types of its outputs."""

    name: str
    dtypes: tuple[mx.Dtype, ...]


class Kernel(NamedTuple):
    """A node of the fused graph that Metal launches, with its number of arrays and of launches."""

    name: str
    arrays: int
    launches: int


def operations(function: Callable[..., Any], *arguments: Any) -> list[Operation]:
    """Return the operations of a function before fusion."""
    found: list[Operation] = []

    def read(part: dict[str, Any]) -> None:
        if part["type"] == "primitive":
            found.append(Operation(part["name"], tuple(dtype for _, _, dtype in part["outputs"])))

    mx.export_function(read, lambda *flat: arrays(function(*flat)), *arguments)
    return found


def arrays(tree: Any) -> list[mx.array]:
    leaves: Any = tree_flatten(tree)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def missing_on_metal(found: list[Operation]) -> list[str]:
    """Return the names of operations that Metal lacks: of linear algebra, in float64, scatters into 8 bytes."""
    return [
        one.name
        for one in found
        if one.name in NOT_ON_METAL
        or mx.float64 in one.dtypes
        or (one.name.startswith("Scatter") and any(dtype.size == 8 for dtype in one.dtypes))
    ]


def kernels(outputs: Any) -> list[Kernel]:
    """Return the kernels that evaluating arrays, in any tree, launches. They must not have been evaluated."""
    text = io.StringIO()
    mx.export_to_dot(text, arrays(outputs))
    dot = text.getvalue()
    names = dict(re.findall(r'^\{ (\d+) \[label ="([^"]+)"', dot, re.MULTILINE))
    counts = Counter(re.findall(r'^"\w+" -> (\d+)$', dot, re.MULTILINE))
    counts += Counter(re.findall(r'^(\d+) -> "\w+"$', dot, re.MULTILINE))
    return [Kernel(name, counts[node], LAUNCHES.get(name, 1)) for node, name in names.items() if name not in FREE]


def launches(outputs: Any) -> int:
    """Return how many kernels evaluating arrays launches."""
    return sum(kernel.launches for kernel in kernels(outputs))
