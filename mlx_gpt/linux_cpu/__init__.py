"""Replacements for slow parts of MLX's CPU backend for Linux. Not imported on other systems.

``openblas.py`` and ``openblas.c`` link MLX's matrix products to NumPy's OpenBLAS, ``kernels.py`` replaces exp, GELU,
attention and layer norm, and ``lanes.py`` spreads a training batch over the cores.
"""

from __future__ import annotations


def status() -> dict[str, str | bool | int]:
    """Return what is in use: ``openblas`` ("in use", or why not), ``kernels`` (for float32) and ``cores``."""
    import mlx.core as mx

    from mlx_gpt.device import cores
    from mlx_gpt.linux_cpu import kernels, openblas

    return {"openblas": openblas.outcome, "kernels": kernels.supports(mx.float32), "cores": cores()}
