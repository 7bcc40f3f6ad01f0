"""The measured speed and the memory of this machine, and the cost of training a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu

Operation = Callable[[mx.array, mx.array], mx.array]  # of the previous value and the first

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container on Linux, in bytes, or "max"
MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)  # n of n x n
VECTOR_SIZES = (1 << 18, 1 << 21, 1 << 24, 1 << 27)
SATURATED = 0.005  # seconds; an operation that takes this long uses the whole machine
FASTER = 1.2  # times the speed from which on another type is worth it
TIMED = 0.05  # seconds of repetitions of a shorter operation


class Machine(NamedTuple):
    """The measured speed and the memory of a machine."""

    matrix_speed: float  # FLOP/s of float32 matrix products
    element_speed: float  # elements/s of x * sigmoid(x), float32, not compiled
    memory: int  # bytes available to a process, on the GPU if there is one


def measure_machine() -> Machine:
    """Measure this machine, in about a second. Memory that MLX has freed is returned to the system."""
    machine = Machine(matrix_speed(), element_speed(), memory_size())
    mx.clear_cache()  # it would keep the largest operands, 1 to 2.5 GB on a GPU
    return machine


def faster_dtype(matrix_speed_float32: float) -> tuple[str, float] | None:
    """Return the half precision in which matrix products are faster, and how many times; None on a CPU, or if none is.

    bfloat16, which needs no scaled loss, unless float16 is faster still: Apple's GPUs before M3 emulate bfloat16.
    """
    if on_cpu():
        return None
    times = {name: matrix_speed(getattr(mx, name)) / matrix_speed_float32 for name in ("bfloat16", "float16")}
    mx.clear_cache()
    name = "float16" if times["float16"] > FASTER * times["bfloat16"] else "bfloat16"
    return (name, times[name]) if times[name] > FASTER else None


def matrix_speed(dtype: mx.Dtype = mx.float32) -> float:
    """Return the highest measured FLOP/s of products of square matrices; an n x n product counts 2 n^3."""
    matrices = (mx.random.normal((n, n), dtype, key=mx.random.key(0), scale=n**-0.5) for n in MATRIX_SIZES)
    return _fastest(matrices, lambda x, w: x @ w, lambda w: 2.0 * len(w) ** 3)


def element_speed() -> float:
    """Return the highest measured elements/s of a float32 activation function, which limits CPUs with fast BLAS."""
    vectors = (mx.random.normal((n,), key=mx.random.key(0)) for n in VECTOR_SIZES)
    return _fastest(vectors, lambda x, _: x * mx.sigmoid(x), len)


def memory_size() -> int:
    """Return the bytes available to a process: of the GPU's working set or memory, else of machine or container."""
    info = {} if on_cpu() else mx.device_info()
    for name in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if int(info.get(name, 0)) > 0:
            return int(info[name])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def training_flops(config: GPTConfig) -> float:
    """Return the model FLOPs of training on a token, in windows of T = n_positions tokens: ``6 N + 12 L C T``.

    Each of the N weights in matrix products costs a multiplication and an addition in the forward pass and two of each
    in the backward pass; so do the T keys and T values of a query in each of L layers (Chowdhery et al. 2022, appendix
    B). N excludes the position embedding. As in the paper, masked scores count, and recomputation does not.
    """
    return 6 * matrix_weights(config) + 12 * config.n_layer * config.n_embd * config.n_positions


def seconds_per_token(config: GPTConfig, machine: Machine, tokens_per_step: int) -> float:
    """Estimate the seconds of training per token, to choose a model size before its speed is measured.

    Matrix products at the matrix speed, everything else by counted elements. The counts were fitted to three small
    models on a CPU; on a GPU, with its fused attention, they are an upper bound, apart from the overhead of a step.
    """
    attention = 2 * config.n_head * config.n_positions if on_cpu() else 0
    block = 12 * config.n_embd + attention
    update = 3 * matrix_weights(config) / tokens_per_step
    elements = config.n_layer * block + 4 * config.vocab_size + update
    return training_flops(config) / machine.matrix_speed + elements / machine.element_speed


def matrix_weights(config: GPTConfig) -> int:
    """Count the weights in matrix products: the matrices of the blocks and the head."""
    C = config.n_embd
    return config.n_layer * (4 * C * C + 2 * C * config.inner_dim) + config.vocab_size * C


def _fastest(arrays: Iterable[mx.array], operation: Operation, work: Callable[[mx.array], float]) -> float:
    """The highest work per second over arrays of increasing size, up to one that saturates the machine."""
    best = 0.0
    for first in arrays:
        seconds = seconds_of(first, operation)
        best = max(best, work(first) / seconds)
        if seconds > SATURATED:
            break
    return best


def seconds_of(first: mx.array, operation: Operation) -> float:
    """Measure the seconds of an operation, in a chain of them if it is short."""

    def run(k: int) -> float:
        x = first
        for _ in range(k):
            x = operation(x, first)
        started = time.perf_counter()
        mx.eval(x)
        return time.perf_counter() - started

    mx.eval(first)
    run(1)
    once = run(1)
    k = min(round(TIMED / once), 64)
    return once if k < 2 else run(k) / k
