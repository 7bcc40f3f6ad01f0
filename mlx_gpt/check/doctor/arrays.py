"""Arrays of MLX, torch and NumPy as NumPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class NotNumbers(TypeError):
    """A value is not an array of numbers; the message gives its type and what was expected."""


def as_numpy(array: Any) -> np.ndarray:
    """Return a copy of an array of any of the three libraries, or of nested lists, as NumPy.

    Floating types that NumPy lacks, such as bfloat16, become float32. Raises ``NotNumbers`` for anything else.
    """
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufV":
        return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float8_e4m3fn") else array.copy()
    mx = sys.modules.get("mlx.core")
    if mx is not None and isinstance(array, mx.array):
        array = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        return np.array(array)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        in_numpy = array.dtype in (torch.float16, torch.float32, torch.float64) or not array.is_floating_point()
        return (array if in_numpy else array.to(torch.float32)).numpy().copy()
    try:
        converted = np.array(array)
    except ValueError:  # lists of different lengths
        converted = np.array(None)
    if converted.dtype.kind not in "biuf":
        raise NotNumbers(f"{type(array).__name__}; expected an array of numbers")
    return converted


def named_arrays(arrays: Any) -> dict[str, np.ndarray]:
    """Return a dict of arrays as NumPy. Raises ``NotNumbers`` for anything else."""
    if not isinstance(arrays, Mapping):
        raise NotNumbers(f"{type(arrays).__name__}; expected a dict of arrays")
    return {str(name): as_numpy(array) for name, array in arrays.items()}


def rms(values: np.ndarray) -> float:
    """Return the root mean square, 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def coarse(values: np.ndarray) -> bool:
    """Return True if all values have no more digits than bfloat16 or float16 can hold."""
    values = np.asarray(values, np.float32)
    low_bits = values.view(np.uint32) & np.uint32(0x1FFF)  # float16 has 10 bits of mantissa, bfloat16 7
    return bool(values.size) and not low_bits.any()


def back_to(array: Any) -> Callable[[np.ndarray], Any]:
    """Return a function from NumPy to the library, type and device of an array."""
    mx, torch = sys.modules.get("mlx.core"), sys.modules.get("torch")
    if mx is not None and isinstance(array, mx.array):
        mlx_type = array.dtype
        return lambda values: mx.array(values).astype(mlx_type)
    if torch is not None and isinstance(array, torch.Tensor):
        dtype, device = array.dtype, array.device
        return lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=dtype)
    numpy_type = getattr(array, "dtype", np.float64)
    return lambda values: values.astype(numpy_type)


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first, second, equal_nan=True)


def misnamed(gradient: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what is wrong with the names and shapes of a gradient, or "". Frozen parameters may be absent."""
    if gradient and not {*gradient} & {*shapes}:
        return f"gradient returned arrays such as {next(iter(gradient))}, which no parameter is called"
    for name, array in gradient.items():
        if array.shape != shapes.get(name, array.shape):
            return f"gradient returned shape {array.shape} for {name}; expected {shapes[name]}, as the parameter has"
    return ""


def wrong_shape(name: str, shape: tuple[int, ...], ids: tuple[int, ...], vocab_size: int) -> str:
    """Return the message about logits of the wrong shape, with the likely reason."""
    hint = ""
    if len(shape) == 3 and shape[:2] == ids:
        hint = f": vocab_size is {vocab_size}, and there are {shape[2]} logits; give vocab_size={shape[2]} if padded"
    elif shape in ((ids[0], vocab_size), (ids[0], 1, vocab_size)):
        hint = ", logits of the last position only; return every position's, as nanoGPT does if targets are given"
    elif shape == (ids[1], ids[0], vocab_size):
        hint = "; time and batch are exchanged"
    return f"{name} returned shape {shape} for ids {ids}; expected {(*ids, vocab_size)}{hint}"
