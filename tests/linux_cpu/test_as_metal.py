"""With ``--as-metal`` MLX answers as on an Apple GPU, and nothing made for Linux's CPU backend is used."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.as_metal import DEVICE, Metal, answer_as_metal

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import n_lanes, on_cpu
from mlx_gpt.generate import memory
from mlx_gpt.generate.memory import memory_limits
from mlx_gpt.model import ops
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.machine import memory_size


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Metal:
    for name in ("metal", "default_device", "device_info", "set_wired_limit"):
        monkeypatch.setattr(mx, name, getattr(mx, name))  # restored afterwards
    return answer_as_metal()


@pytest.mark.usefixtures("metal")
def test_as_on_metal_the_forms_for_linux_are_off() -> None:
    assert not on_cpu()
    assert not ops.custom_kernels(mx.float32)
    assert n_lanes(8) == 1
    assert memory_size() == DEVICE["max_recommended_working_set_size"]


def test_as_on_metal_calls_are_recorded(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WIRED_FROM", 1)
    with memory_limits(GPT(GPTConfig(64, n_positions=8, n_embd=8, n_layer=1, n_head=1))):
        pass
    (name, (limit,)), (_, restored) = metal.calls
    assert name == "set_wired_limit"
    assert limit > memory.RESERVE
    assert restored == (0,)
