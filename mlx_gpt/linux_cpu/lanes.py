"""A training batch spread over the cores of a CPU: MLX's CPU backend runs each stream on one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gpt.device import cores, on_cpu
from mlx_gpt.linux_cpu.openblas import set_threads

LossAndGradient = Callable[[mx.array, mx.array], tuple[mx.array, Any]]


def configure(n: int) -> None:
    """Prepare MLX and OpenBLAS for training steps in n shares: with several, each product takes one core."""
    set_graph_width(wide=n > 1)
    set_threads(1 if n > 1 else cores())


def over_lanes(loss_and_gradient: LossAndGradient, compile_share: Callable[[Any], Any], n: int) -> LossAndGradient:
    """Return the mean of loss and gradient over n equal shares of a batch, each compiled and on a stream of its own.

    Shares are compiled separately: in one graph MLX would merge what is equal in two shares, such as a broadcast
    constant, and could then fuse it with the operations of one of them only.
    """
    device = mx.default_device()
    streams = [mx.default_stream(device)] + [mx.new_stream(device) for _ in range(n - 1)]

    def on_stream(stream: mx.Stream) -> LossAndGradient:
        def share(x: mx.array, y: mx.array) -> tuple[mx.array, Any]:
            with mx.stream(stream):
                return loss_and_gradient(x, y)

        compiled: LossAndGradient = compile_share(share)
        return compiled

    shares = [on_stream(stream) for stream in streams]
    mean = mx.compile(lambda *results: tree_map(lambda *parts: sum(parts[1:], parts[0]) * (1 / n), *results))

    def spread(x: mx.array, y: mx.array) -> tuple[mx.array, Any]:
        rows = zip(shares, mx.split(x, n), mx.split(y, n), strict=True)
        result: tuple[mx.array, Any] = mean(*(share(*its) for share, *its in rows))
        return result

    return spread


def set_graph_width(wide: bool) -> None:
    """Set the width up to which MLX orders a graph breadth first, unless the environment sets it.

    Streams run side by side only if the width exceeds that of a training step; a narrow graph takes less memory, which
    recomputation relies on. MLX reads the width at its first evaluation, so only the first call counts.
    """
    if on_cpu():
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000" if wide else "20")
