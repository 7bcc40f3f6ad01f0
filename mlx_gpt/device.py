"""Where MLX computes: on a GPU, or on the cores of a CPU."""

from __future__ import annotations

import os

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on the CPU. Asked when something is about to be computed: the default device can change."""
    return mx.default_device() == mx.Device(mx.cpu)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
