"""Let MLX answer as on an Apple GPU while it computes on the CPU: ``pytest --as-metal``.

The package then takes the paths of a Mac: none of ``linux_cpu``'s forms, one lane, Metal's memory limits. What only the
GPU computes otherwise, its kernels and their rounding, is not covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

DEVICE = {
    "architecture": "applegpu_g15s",
    "device_name": "Apple M3 Max",
    "max_buffer_length": 1 << 34,
    "max_recommended_working_set_size": 1 << 34,
    "memory_size": 1 << 35,
    "resource_limit": 499_000,
}


class Metal:
    """Stands for ``mx.metal`` and the limits of ``mx``: records calls, by name and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.wired = 0

    def is_available(self) -> bool:
        return True

    def device_info(self) -> dict[str, Any]:
        return dict(DEVICE)

    def set_wired_limit(self, limit: int) -> int:
        self.calls.append(("set_wired_limit", (limit,)))
        before, self.wired = self.wired, limit
        return before

    def start_capture(self, path: str) -> None:
        self.calls.append(("start_capture", (path,)))

    def stop_capture(self) -> None:
        self.calls.append(("stop_capture", ()))


def answer_as_metal() -> Metal:
    """Replace MLX's queries of the device for the rest of the process, and return what records the calls."""
    metal, gpu = Metal(), mx.Device(mx.gpu)
    for name, stub in {
        "metal": metal,
        "default_device": lambda: gpu,
        "device_info": metal.device_info,
        "set_wired_limit": metal.set_wired_limit,
    }.items():
        setattr(mx, name, stub)
    return metal


@contextmanager
def fused_inference() -> Iterator[None]:
    """Let layer norm and attention be one operation each, as on Metal, where MLX's CPU backend has several.

    For graphs that are not evaluated. In training Metal has the CPU's operations for attention, which has no fused
    backward pass there (``ScaledDotProductAttentionVJP::use_fallback``).
    """
    before = mx.fast.layer_norm, mx.fast.scaled_dot_product_attention

    def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
        return mx.cumsum(mx.depends([x], [weight, bias])[0], axis=-1)

    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any = None, **options: Any) -> mx.array:
        return mx.cumsum(mx.depends([q], [k, v, *([mask] if isinstance(mask, mx.array) else [])])[0], axis=-1)

    mx.fast.layer_norm, mx.fast.scaled_dot_product_attention = layer_norm, attention
    try:
        yield
    finally:
        mx.fast.layer_norm, mx.fast.scaled_dot_product_attention = before
