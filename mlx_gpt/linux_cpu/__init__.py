"""Replacements for slow parts of MLX's CPU backend for Linux. Not imported on other systems.

``openblas.py`` and ``openblas.c`` link MLX's matrix products to NumPy's OpenBLAS, ``kernels.py`` replaces exp, GELU,
attention and layer norm, ``lanes.py`` spreads a training batch over the cores, and ``kernel_folder.py`` gives MLX's
compiled code a private folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from mlx_gpt.errors import UsageError


def set_up() -> None:
    """Give MLX a BLAS and a folder to compile in, before it is imported; ``status`` says what was possible."""
    from mlx_gpt.linux_cpu import kernel_folder, openblas

    kernel_folder.use_private_folder()
    openblas.use_numpy_openblas()


def check_environment() -> str | None:
    """Return a remark for the user if MLX cannot compile; ``UsageError`` for a switch that is neither 0 nor 1."""
    from mlx_gpt.linux_cpu import kernel_folder, openblas

    if (value := os.environ.get(openblas.SWITCH, "")) not in ("", "0", "1"):
        raise UsageError(f"{openblas.SWITCH} must be 0 (off) or 1 (on), not {value!r}")
    if kernel_folder.outcome == kernel_folder.IN_USE:
        return None
    return f"MLX compiles no kernels, which takes more time: {kernel_folder.outcome}"


def compilation_reported(report: Callable[[], None]) -> AbstractContextManager[None]:
    """Return ``kernel_folder.compilation_reported``."""
    from mlx_gpt.linux_cpu import kernel_folder

    return kernel_folder.compilation_reported(report)


def status() -> dict[str, str | bool | int]:
    """Return what is in use: ``openblas`` and ``kernel_folder`` ("in use", or why not), ``kernels``, ``cores``."""
    import mlx.core as mx

    from mlx_gpt.device import cores
    from mlx_gpt.linux_cpu import kernel_folder, kernels, openblas

    return {
        "openblas": openblas.outcome,
        "kernel_folder": kernel_folder.outcome,
        "kernels": kernels.supports(mx.float32),
        "cores": cores(),
    }
