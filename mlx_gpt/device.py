"""The device that MLX computes on: a GPU, or the cores of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

import mlx.core as mx

from mlx_gpt.errors import UsageError

VARIABLE = "MLX_GPT_DEVICE"  # cpu or gpu: the default device of a command
ON_A_MAC = sys.platform == "darwin"
SLOW = 2.0  # seconds
begun: set[str] = set()  # blocks of ``first_reported``
XCODE_SELECT = "/usr/bin/xcode-select"  # part of macOS; -p fails without the command line tools


def choose_device() -> None:
    """Set the default device to that of ``MLX_GPT_DEVICE``, if it is set. Raises ``UsageError`` for one not here."""
    name = os.environ.get(VARIABLE, "")
    if name not in ("", "cpu", "gpu"):
        raise UsageError(f"{VARIABLE} must be cpu or gpu, not {name!r}")
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise UsageError(f"{VARIABLE}=gpu: MLX finds no GPU here; leave it out")
    if name:
        mx.set_default_device(mx.Device(getattr(mx, name)))


def on_cpu() -> bool:
    """Return whether the default device is the CPU. It can change, so call this when it matters."""
    return mx.default_device() == mx.Device(mx.cpu)


@contextmanager
def without_compiler_dialog() -> Iterator[None]:
    """Compute on the CPU without compiled kernels on a Mac that lacks the command line tools.

    MLX would run ``g++ --version`` (jit_compiler.cpp), which opens macOS's dialog that offers to install them.
    """
    missing = sys.platform == "darwin" and subprocess.run([XCODE_SELECT, "-p"], capture_output=True).returncode != 0
    if missing:
        mx.disable_compile()
    try:
        yield
    finally:
        if missing:
            mx.enable_compile()


@contextmanager
def first_reported(what: str) -> Iterator[None]:
    """On a Mac, report to stderr the first block of this name in the process if it takes longer than ``SLOW``.

    Metal compiles kernels in it, and macOS keeps them for the next run. Nothing shows whether it does, and a large
    model is slow without, so that the line names it as a property of first runs.
    """
    line = f"mlx-gpt: the first {what} takes longer than {SLOW:g} s; on its first run here MLX compiles kernels"
    timer = Timer(SLOW, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if ON_A_MAC and what not in begun:
        timer.start()
    begun.add(what)
    try:
        yield
    finally:
        timer.cancel()


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_lanes(batch_size: int) -> int:
    """Return the number of equal shares of a training batch that are computed side by side.

    On Linux without a GPU one share per core, if the batch can be divided so (``linux_cpu/lanes.py``); elsewhere 1.
    """
    limit = min(cores(), batch_size) if sys.platform.startswith("linux") and on_cpu() else 1
    return max(n for n in range(1, limit + 1) if batch_size % n == 0)
