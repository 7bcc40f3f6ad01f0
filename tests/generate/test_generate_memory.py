"""Memory limits on Metal, peak memory, and the figures of a generation."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.generate import memory, stats
from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.generation import Generation, generate
from mlx_gpt.generate.memory import memory_limits
from mlx_gpt.generate.prompt_cache import PromptCache
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.stats import GenerationStats, memory_speed, weight_bytes
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()


def new_model(**shape: Any) -> GPT:
    mx.random.seed(0)
    return GPT(GPTConfig(vocab_size=257, **({"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2} | shape)))


# Metal, simulated


class Metal:
    """Simulates MLX on Metal: records the limits and returns the previous ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.limits = {"wired": 0, "cache": 7}
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 34})
        monkeypatch.setattr(mx, "set_wired_limit", lambda n: self._set("wired", n))
        monkeypatch.setattr(mx, "set_cache_limit", lambda n: self._set("cache", n))

    def _set(self, name: str, limit: int) -> int:
        before, self.limits[name] = self.limits[name], limit
        self.calls.append((name, limit))
        return before


def large_model(monkeypatch: pytest.MonkeyPatch) -> GPT:
    """Return a small model that counts as one to keep resident."""
    monkeypatch.setattr(memory, "WIRED_FROM", 1)
    return new_model()


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_on_metal_the_limits_are_set_and_restored(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metal, model = Metal(monkeypatch), large_model(monkeypatch)
    with pytest.raises(KeyError) if ends == "in an error" else nullcontext(), memory_limits(model, rows=3):
        cache = 3 * 2 * 2 * 32 * 32 * 4  # rows, keys and values, layers, positions, width, bytes
        assert metal.limits == {"wired": 4 * model.n_parameters + cache + memory.RESERVE, "cache": memory.FREED}
        if ends == "in an error":
            raise KeyError
    assert metal.limits == {"wired": 0, "cache": 7}


def test_no_more_than_the_working_set_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    metal, model = Metal(monkeypatch), large_model(monkeypatch)
    with memory_limits(model, rows=1 << 20):
        assert metal.limits["wired"] == 1 << 34


def test_on_metal_the_limits_are_restored_if_the_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    metal, model = Metal(monkeypatch), large_model(monkeypatch)

    def fail() -> None:
        raise RuntimeError("[METAL] Command buffer execution failed")

    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(RuntimeError, match="Command buffer"), memory_limits(model):
        pass
    assert metal.limits == {"wired": 0, "cache": 7}


@pytest.mark.parametrize("why", ["a small model", "no Metal"])
def test_only_freed_buffers_are_limited_with(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metal = Metal(monkeypatch)
    model = new_model() if why == "a small model" else large_model(monkeypatch)
    if why == "no Metal":
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with memory_limits(model):
        assert metal.limits == {"wired": 0, "cache": memory.FREED}
    assert metal.limits == {"wired": 0, "cache": 7}


@pytest.mark.parametrize("command", ["generate", "talk"])
def test_a_session_sets_the_limits_once(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    metal = Metal(monkeypatch)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(memory, "WIRED_FROM", 1)
    save(new_model(), TOKENIZER, tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert main([command, str(tmp_path / "model"), "--max-tokens", "2"]) == 0
    assert [name for name, _ in metal.calls] == ["cache", "wired", "wired", "cache"]


def test_generation_alone_leaves_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = Metal(monkeypatch)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    "".join(generate(new_model(), TOKENIZER, "a", max_tokens=3))  # as for samples during training
    assert metal.calls == []


# Memory and time


@pytest.mark.freed_at_once
def test_peak_memory_is_that_of_weights_and_cache() -> None:
    config = {"n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4}
    model = new_model(**config)
    mx.eval(model.parameters())
    run = Generation(model, TOKENIZER, [[65] * 20], GenerationSettings(temperature=0, max_tokens=200, min_tokens=200))
    list(run)  # warm-up: compiled functions and split matrices stay
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run = Generation(model, TOKENIZER, [[65] * 20], GenerationSettings(temperature=0, max_tokens=200, min_tokens=200))
    list(run)
    cache = 2 * 4 * 4 * 256 * 256  # keys and values, layers, bytes, positions, width
    needed = model.n_parameters * 4 + cache
    assert mx.get_peak_memory() - before < 0.15 * needed + cache


def test_the_first_token_does_not_wait_for_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    turn = Decoder.step_and_choose

    def spy(self: Decoder, *arguments: Any) -> Any:
        turns.append(1)
        return turn(self, *arguments)

    monkeypatch.setattr(Decoder, "step_and_choose", spy)
    run = iter(Generation(new_model(), TOKENIZER, [[65]], GenerationSettings(max_tokens=6, min_tokens=6)))
    counts = []
    for _ in range(6):
        next(run)
        counts.append(len(turns))
    assert counts == [0, 2, 3, 4, 5, 5]  # the next token is computed while one is shown


def test_figures_count_tokens_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stats.time, "perf_counter", lambda: now[0])
    found = GenerationStats(new_model(), 20)
    found.weight_bytes = 1000
    assert found.summary(1e9).startswith("peak memory ")
    found.start()
    for seconds, tokens in ((2.0, 1), (0.5, 2), (0.5, 2)):  # two rows, of which one ends at the first step
        now[0] += seconds
        found.count(tokens)
    assert (found.prompt_seconds, found.prompt_speed, found.speed) == (2.0, 10.0, 4.0)
    assert found.memory_share(4000) == 0.5  # two steps read 1000 bytes each, in a second
    assert found.summary(4000).startswith("prompt of 20: 10.0 tokens/s; text: 4.0 tokens/s, 50% of this machine's")
    assert found.as_dict(4000)["share_of_memory_speed"] == 0.5


def test_only_tokens_that_are_read_count_as_prompt() -> None:
    model = new_model()
    run = Generation(model, TOKENIZER, [[1, 2, 3]], GenerationSettings(max_tokens=1))
    run.read_prompt()
    before = PromptCache([1, 2, 3], [(layer.keys, layer.values) for layer in run.decoder.cache], None)
    assert Generation(model, TOKENIZER, [[4, 5]], GenerationSettings(), prefix=before).stats.prompt_tokens == 2
    assert Generation(model, TOKENIZER, [[]], GenerationSettings(), prefix=before).stats.prompt_tokens == 1


def test_weight_bytes_are_those_a_step_reads() -> None:
    model = new_model()
    assert weight_bytes(model) == 4 * (model.n_parameters - 32 * 32)  # without the positions
    untied = new_model(tie_word_embeddings=False)
    assert weight_bytes(untied) == weight_bytes(model)


@pytest.mark.cpu  # a GPU gets several products at once
def test_memory_speed_is_that_of_reading_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 0.05
        return now[0]

    monkeypatch.setattr(stats.time, "perf_counter", tick)
    assert memory_speed() == pytest.approx((64 << 20) / 0.05)
