"""The machine that is measured: chip, memory, power source, versions, and the limits of its speed."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from mlx_gpt.device import on_cpu
from mlx_gpt.generate.stats import memory_speed
from mlx_gpt.train.machine import memory_size, seconds_of

PACKAGES = ("mlx", "mlx-gpt", "mlx-lm", "torch", "transformers")
SIZES = (1024, 2048, 4096)  # n of n x n
SLOW = 0.3  # seconds of a product after which no larger one is measured
COPIED = 1 << 28  # bytes


def describe() -> dict[str, Any]:
    """Return chip, memory in bytes, power source, system and versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "chip": str(mx.device_info().get("device_name", platform.processor())),
        "device": "cpu" if on_cpu() else "gpu",
        "memory_bytes": memory_size(),
        "power": power_source(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **found},
    }


def power_source() -> str:
    """Return "AC Power" or "Battery Power" on a Mac, where a battery slows the GPU down; elsewhere "unknown"."""
    if sys.platform != "darwin":
        return "unknown"
    shown = subprocess.run(["/usr/bin/pmset", "-g", "batt"], capture_output=True, text=True).stdout
    return shown.partition("'")[2].partition("'")[0] or "unknown"


def limits(progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure FLOP/s of matrix products by type and size, and bytes/s of a copy and of matrix-vector products.

    A copy reads and writes each byte, and counts twice. On a CPU only float32 is measured.
    """
    products: dict[str, dict[str, float]] = {}
    for name in ("float32",) if on_cpu() else ("float32", "float16", "bfloat16"):
        for n in SIZES:
            progress(f"matrix product, {name}, {n}")
            x = mx.random.normal((n, n), getattr(mx, name), key=mx.random.key(0), scale=n**-0.5)
            seconds = seconds_of(x, lambda x, w: x @ w)
            products.setdefault(name, {})[str(n)] = 2 * n**3 / seconds
            if seconds > SLOW:
                break
    progress("memory")
    copied = mx.zeros((COPIED // 4,))
    copy = 2 * copied.nbytes / seconds_of(copied, lambda x, _: x + 1)
    found = {"matrix_product": products, "copy": copy, "matrix_vector": memory_speed(65536)}
    mx.clear_cache()
    return found
