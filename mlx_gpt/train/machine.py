"""What this machine can do, measured, and what a model asks of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import cores, on_cpu

Chain = tuple[mx.array, Callable[[mx.array], mx.array]]  # where to begin, and a link: one more operation

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container on Linux, in bytes, or "max"
MATRICES = (256, 512, 1024, 2048, 4096, 8192)  # n of the n x n matrices whose product is timed
VECTORS = (1 << 18, 1 << 21, 1 << 24, 1 << 27)  # elements of the vectors that are bent
ENOUGH = 0.005  # seconds: what takes so long is large enough to fill the machine
TIMED = 0.05  # seconds that a timing lasts, where what is timed is shorter


class Machine(NamedTuple):
    """This machine, as ``measure`` found it."""

    matrix_speed: float  # FLOP/s in products of float32 matrices
    element_speed: float  # elements/s in x * sigmoid(x), float32, not compiled
    memory: int  # bytes that a process may use, of the GPU's memory where there is one


def measure() -> Machine:
    """Look at this machine for about a second."""
    return Machine(matrix_speed(), element_speed(), memory_size())


def matrix_speed(dtype: mx.Dtype = mx.float32) -> float:
    """The most floating-point operations a second (FLOP/s) that products of square matrices reach here.

    An n x n product counts 2 n^3. On a CPU, where MLX runs a stream on one thread, every core multiplies by itself if
    that is faster. What a GPU reaches with float16 is for ``dtype`` to ask.
    """

    def chain(n: int) -> Chain:
        w = mx.random.normal((n, n), key=mx.random.key(0), scale=n**-0.5).astype(dtype)
        return w, lambda x: x @ w

    return _fastest(MATRICES, chain, lambda n: 2.0 * n**3)


def element_speed() -> float:
    """Elements a second that an activation function takes, float32: what a CPU is bound by once products are fast."""
    return _fastest(
        VECTORS,
        lambda n: (mx.random.normal((n,), key=mx.random.key(0)), lambda x: x * mx.sigmoid(x)),
        lambda n: float(n),
    )


def memory_bandwidth() -> float:
    """Bytes a second that pass when a large float32 array is read and written again, both counted."""
    n = 1 << 25  # 128 MiB: more than any cache
    return 2 * 4 * n / _time((mx.zeros((n,)), lambda x: x + 1.0), _ways()[0])


def memory_size() -> int:
    """Bytes that a process may use: the GPU's working set or memory, else the memory of machine or container."""
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


def training_flops(config: GPTConfig, T: int | None = None) -> float:
    """Floating-point operations that the model needs for one token of training, in windows of T tokens: model FLOPs.

    ``6 N + 12 L C T``: every weight of a matrix product multiplies and adds once on the way forward and twice on the
    way back, and so do the T keys and T values of a query in each of the L layers (Chowdhery et al. 2022, appendix B).
    N counts the matrices of the blocks and the head, not the position embedding, which only adds. As there, the
    causal mask's half of the scores is counted too, and what ``--recompute`` does again is not.
    """
    C, L = config.n_embd, config.n_layer
    T = T or config.n_positions
    return 6 * matrix_weights(config) + 12 * L * C * T


def seconds_per_token(config: GPTConfig, machine: Machine, tokens_per_step: int) -> float:
    """How long training takes on a token, about: to choose a size by, before it is measured.

    Products at the matrix speed, everything else by counted elements. The counts were fitted to steps of three small
    models on a CPU; on a GPU, whose attention is fused, they are an upper bound but for what it costs to start a step.
    """
    pattern = 2 * config.n_head * config.n_positions if on_cpu() else 0
    block = 12 * config.n_embd + pattern
    updated = 3 * matrix_weights(config) / tokens_per_step  # by the optimizer
    elements = config.n_layer * block + 4 * config.vocab_size + updated
    return training_flops(config) / machine.matrix_speed + elements / machine.element_speed


def matrix_weights(config: GPTConfig) -> int:
    """How many weights take part in a matrix product for each token: the blocks' matrices and the head."""
    C = config.n_embd
    return config.n_layer * (4 * C * C + 2 * C * config.inner_dim) + config.vocab_size * C


def lanes(batch_size: int, spread: bool = False) -> int:
    """Over how many streams the rows of a batch are spread (``step.batch_lanes``); with ``spread`` at most over so
    many, also where they cannot be shared evenly."""
    most = min(cores(), batch_size) if on_cpu() else 1
    return most if spread else max(n for n in range(1, most + 1) if batch_size % n == 0)


def set_breadth(side_by_side: bool) -> None:
    """How MLX orders a graph on a CPU, unless the environment says it: for streams side by side, or for little memory.

    MLX goes breadth first, up to a width that is less than a training step has: streams would run one after the other.
    But a wider graph has more in memory at once, and what ``--recompute`` saves would be lost. MLX reads the width when
    it evaluates for the first time, so only the first call counts.
    """
    if on_cpu():  # a GPU has one stream, and MLX's own width
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000" if side_by_side else "20")


def _ways() -> list[list[mx.Stream]]:
    """One stream; and on a CPU with more cores, one for each of them."""
    device = mx.default_device()
    one = [mx.default_stream(device)]
    if not on_cpu() or cores() == 1:
        return [one]
    set_breadth(True)
    return [one, one + [mx.new_stream(device) for _ in range(cores() - 1)]]


def _fastest(sizes: Sequence[int], chain: Callable[[int], Chain], work: Callable[[int], float]) -> float:
    """The most work a second, over sizes that fill the machine better and better, and over ways to use its cores."""
    best = 0.0
    for n in sizes:
        seconds = [_time(chain(n), streams) / len(streams) for streams in _ways()]
        best = max(best, work(n) / min(seconds))
        if max(seconds) > ENOUGH:
            break
    return best


def _time(chain: Chain, streams: list[mx.Stream]) -> float:
    """Seconds that a link of a chain takes, with a chain on each stream at once."""
    first, link = chain

    def run(k: int) -> float:
        ends = []
        for stream in streams:
            with mx.stream(stream):
                x = first
                for _ in range(k):
                    x = link(x)
                ends.append(x)
        started = time.perf_counter()
        mx.eval(ends)
        return time.perf_counter() - started

    mx.eval(first)
    run(1)  # to warm up
    once = run(1)
    k = round(TIMED / once)
    return once if k < 2 else run(min(k, 64)) / min(k, 64)
