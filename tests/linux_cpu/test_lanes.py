"""The graph width is set for training on a CPU only."""

from __future__ import annotations

import os
import sys

import mlx.core as mx
import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="used on Linux only")
def test_the_graph_is_wide_only_on_a_cpu_and_for_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_gpt.linux_cpu.lanes import set_graph_width

    for device, wide, width in ((mx.gpu, True, None), (mx.cpu, True, "1000"), (mx.cpu, False, "20")):
        monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        set_graph_width(wide)
        assert os.environ.get("MLX_BFS_MAX_WIDTH") == width
