"""Metal's memory limits during a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from mlx_gpt.device import on_cpu


@contextmanager
def metal_limits(weight_bytes: int) -> Iterator[None]:
    """Keep the weights resident on Metal and limit MLX's cache of freed buffers; do nothing on other devices.

    Without the wired limit the system may page weights out between steps. Without the cache limit buffers of every
    text length stay allocated. On exit both are restored, even if waiting for the GPU raises its error.
    """
    with ExitStack() as on_exit:  # the last callback runs first, and all of them run
        if not on_cpu() and mx.metal.is_available():
            working_set = int(mx.device_info()["max_recommended_working_set_size"])
            on_exit.callback(mx.set_wired_limit, mx.set_wired_limit(working_set))
            on_exit.callback(mx.set_cache_limit, mx.set_cache_limit(max(weight_bytes // 10, 64 << 20)))
            on_exit.callback(mx.synchronize)  # the weights stay wired until no kernel reads them
        yield
