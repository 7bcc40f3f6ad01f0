"""The memory of a step is estimated within 30 % of what MLX counts, and a batch that cannot fit is refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import TINY, everything, the_line

from mlx_gpt.cli import main
from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train import machine
from mlx_gpt.train import run as run_module
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.memory import ERROR, check_memory, largest_batch, n_parameters, step_memory
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

SHAPE = GPTConfig(257, n_positions=64, n_embd=64, n_layer=6, n_head=2)
GPT2 = PRESETS["gpt2"]


@pytest.fixture
def counted_exactly() -> Iterator[None]:
    """Make MLX free memory at once and cache none, so that a peak is what was needed."""
    limit, cache = mx.set_memory_limit(1), mx.set_cache_limit(0)
    yield
    mx.set_memory_limit(limit)
    mx.set_cache_limit(cache)


def peak(config: GPTConfig, training: TrainConfig) -> int:
    """Return the bytes that a step took."""
    gc.collect()  # the models of other tests
    before = mx.get_active_memory()
    step, state = make_train_step(GPT(config), make_optimizer(training, config.n_head), training)
    shape = (training.accumulate * training.batch_size, config.n_positions + 1)
    ids = mx.array(np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32))
    mx.eval(ids)
    mx.reset_peak_memory()
    mx.eval(step(ids[:, :-1], ids[:, 1:]), state)
    return mx.get_peak_memory() - before


@pytest.mark.freed_at_once
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"n_layer": 2}, {}),
        ({}, {}),
        ({"n_positions": 256, "n_head": 4, "n_layer": 2}, {"batch_size": 4}),
        ({"vocab_size": 4096, "n_layer": 2}, {}),
        ({"vocab_size": 50257, "n_embd": 32, "n_layer": 1}, {"batch_size": 16}),  # more than a chunk
        ({"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 32}, {"batch_size": 2}),  # little beside the weights
        ({"resid_pdrop": 0.1, "embd_pdrop": 0.1}, {}),
        ({"n_positions": 256, "n_head": 4, "n_layer": 3, "attn_pdrop": 0.1}, {}),
        ({}, {"optimizer": "muon"}),
        ({}, {"accumulate": 3}),
        ({}, {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_estimate_is_near_what_mlx_counts(
    shape: dict[str, Any], how: dict[str, Any], counted_exactly: None
) -> None:
    config, training = replace(SHAPE, **shape), TrainConfig(**how)
    estimate, measured = step_memory(config, training), peak(config, training)
    assert abs(measured / estimate - 1) < ERROR, f"estimated {estimate:,}, measured {measured:,}"


@pytest.mark.parametrize(
    ("shape", "how", "megabytes"),
    [
        ({"n_layer": 2}, {}, 10.3),
        ({}, {}, 28.7),
        ({"n_positions": 256, "n_head": 4, "n_layer": 2}, {"batch_size": 4}, 27.3),
        ({"vocab_size": 4096, "n_layer": 2}, {}, 18.9),
        ({"vocab_size": 50257, "n_embd": 32, "n_layer": 1}, {"batch_size": 16}, 141.2),
        ({"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 32}, {"batch_size": 2}, 58.4),
        ({"resid_pdrop": 0.1, "embd_pdrop": 0.1}, {}, 30.6),
    ],
    ids=str,
)
def test_the_estimate_is_near_what_was_counted_on_a_gpu(
    shape: dict[str, Any], how: dict[str, Any], megabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100 with MLX 0.32.4 for CUDA 13, ``MLX_MAX_OPS_PER_BUFFER=1`` and ``MLX_MAX_MB_PER_BUFFER=1``.

    GELU saved 8 C numbers for each token and block then, which it computes again now.
    """
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    config, training = replace(SHAPE, **shape), TrainConfig(**how)
    saved = 4 * 8 * config.n_embd * config.n_layer * training.batch_size * config.n_positions
    estimate = step_memory(config, training)
    assert abs((1e6 * megabytes - saved) / estimate - 1) < ERROR, f"estimated {estimate:,}"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "tiny"])
def test_parameters_are_counted_without_a_model(name: str) -> None:
    counts = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "tiny": GPT(PRESETS["tiny"]).n_parameters}
    assert n_parameters(PRESETS[name]) == counts[name]
    loose = replace(SHAPE, tie_word_embeddings=False, n_inner=100)
    assert n_parameters(loose) == GPT(loose).n_parameters


# Batches that cannot fit


@pytest.mark.parametrize("room", [2e9, 4e9, 8e9, 30e9])
def test_the_largest_batch_fits_and_one_more_row_does_not(room: float) -> None:
    training = TrainConfig()
    fits = largest_batch(GPT2, training, int(room))
    if fits:
        assert step_memory(GPT2, replace(training, batch_size=fits)) <= room
        check_memory(GPT2, replace(training, batch_size=fits), int(room))
    assert step_memory(GPT2, replace(training, batch_size=fits + 1), max_lanes=True) > room
    assert largest_batch(GPT2, replace(training, recompute=True), int(room)) >= fits


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_does() -> None:
    with pytest.raises(
        UsageError, match=r"--batch-size 512 needs about \d+\.\d GB in a step, and this machine has 8.0 GB"
    ):
        check_memory(GPT2, TrainConfig(batch_size=512), int(8e9))
    with pytest.raises(
        UsageError, match=r"the largest that fits is --batch-size \d+; with --recompute it is \d+; --acc"
    ):
        check_memory(GPT2, TrainConfig(batch_size=512), int(8e9))
    with pytest.raises(UsageError, match="not even one row fits: choose a smaller model"):
        check_memory(PRESETS["gpt2-xl"], TrainConfig(), int(2e9))


def test_a_batch_that_cannot_fit_is_refused_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "memory_size", lambda: 1_000_000)
    before = everything(here)
    flags = [*TINY, "--steps", "1", "--batch-size", "4000", "--learning-rate", "1e-3"]
    assert main(["train", "--data", "text.txt", "--out", "run", *flags]) == 2
    message = the_line(capsys.readouterr().err)
    assert message.startswith("--batch-size 4000 needs about ")
    (fits,) = [int(word) for word in message.split("the largest that fits is --batch-size ")[1].split(";")[:1]]
    assert everything(here) == before
    flags[flags.index("4000")] = str(fits)
    assert main(["train", "--data", "text.txt", "--out", "run", *flags]) == 0


@pytest.mark.cpu
def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = machine.memory_size()
    (tmp_path / "memory.max").write_text("123456789\n")
    assert machine.memory_size() == 123_456_789
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_size() == whole
