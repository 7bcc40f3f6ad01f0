"""The device that MLX computes on: a GPU, or the cores of a CPU."""

from __future__ import annotations

import os
import sys

import mlx.core as mx


def on_cpu() -> bool:
    """Return whether the default device is the CPU. It can change, so call this when it matters."""
    return mx.default_device() == mx.Device(mx.cpu)


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_lanes(batch_size: int) -> int:
    """Return the number of equal shares of a training batch that are computed side by side.

    On Linux without a GPU one share per core, if the batch can be divided so (``linux_cpu/lanes.py``); elsewhere 1.
    """
    limit = min(cores(), batch_size) if sys.platform.startswith("linux") and on_cpu() else 1
    return max(n for n in range(1, limit + 1) if batch_size % n == 0)
