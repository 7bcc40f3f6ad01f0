"""On a Mac, what a model at work may hold in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_gpt.device import on_cpu


@contextmanager
def held_in_memory(weight_bytes: int) -> Iterator[None]:
    """Meanwhile Metal keeps the weights resident, and MLX keeps little of what it has freed. Elsewhere nothing is set.

    Without the wired limit the system may page weights out between steps; without the cache limit buffers of every
    length of text would stay.
    """
    if on_cpu() or not mx.metal.is_available():
        yield
        return
    wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    cache = mx.set_cache_limit(max(weight_bytes // 10, 64 << 20))
    try:
        yield
    finally:
        mx.synchronize()  # the weights are let go only when nobody reads them any more
        mx.set_cache_limit(cache)
        mx.set_wired_limit(wired)
