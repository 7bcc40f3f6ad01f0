"""The arguments of ``examine`` for a model of this package: they are of one model, whole, padded or quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import TRAIN

from mlx_gpt.check.doctor.examine import make_case
from mlx_gpt.check.doctor.own import own_arguments, run_of
from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import convert, save
from mlx_gpt.store.layouts import read_source
from mlx_gpt.text.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=257, n_positions=32, n_embd=64, n_layer=1, n_head=2, initializer_range=0.3)


def folder(kind: str, path: Path) -> Path:
    mx.random.seed(0)
    save(GPT(replace(CONFIG, vocab_size=320) if kind == "padded" else CONFIG), Tokenizer.bytes(), path / "model")
    if kind != "quantized":
        return path / "model"
    convert(read_source(path / "model"), path / "quantized", bits=8)
    return path / "quantized"


@pytest.mark.parametrize("kind", ["whole", "padded", "quantized"])
def test_sampling_cache_and_reloaded_model_are_those_of_the_forward_pass(kind: str, tmp_path: Path) -> None:
    with own_arguments(folder(kind, tmp_path), None, pytest.fail) as arguments:
        case = make_case(arguments)
        assert case.vocab_size == 257
        ids = case.ids(1, 12)
        logits = case.logits(ids)[0]
        np.testing.assert_allclose(case.given["cached"](ids[0].tolist(), 5), logits, atol=2e-4)
        prompts = [[5, 6, 7], [1], list(range(9))]
        sampled = [case.given["sample"](list(prompt), 6, temperature=0) for prompt in prompts]
        assert case.given["sample_many"](prompts, 6, temperature=0) == sampled
        assert sampled[1][0] == case.logits([[1]])[0, -1].argmax()
        assert case.given["decode"](case.given["encode"]("a text")) == "a text"
        if kind == "whole":
            np.testing.assert_array_equal(case.logits(ids, "reload", case.given["reload"]())[0], logits)
            x, y = ids[:, :-1], ids[:, 1:]
            losses = logits[:-1] - logits[:-1].max(-1, keepdims=True)
            losses = np.log(np.exp(losses).sum(-1)) - losses[np.arange(11), y[0]]
            assert case.number("loss", x, y) == pytest.approx(losses.mean(), rel=1e-4)
            assert case.arrays("gradient", x, y).keys() == case.arrays("parameters").keys()


def test_the_step_of_a_run_has_its_optimizer_and_starts_anew(here: Path) -> None:
    settings = ["--optimizer", "muon", "--muon-learning-rate", "0.01", "--learning-rate", "0.002", "--accumulate", "2"]
    assert main([*TRAIN, *settings, "--checkpoint-every", "1"]) == 0
    assert run_of(here / "run/checkpoints/step-2") == here / "run"
    with own_arguments(here / "run", None, pytest.fail) as arguments:
        assert arguments["learning_rate"] == 0.002
        x, y = next(arguments["batches"]())
        assert x.shape == (2, 16)
        assert arguments["val_loss"] == min(row["val_loss"] for row in arguments["metrics"] if "val_loss" in row)
        case = make_case(arguments)
        start = case.arrays("parameters")

        def moved() -> dict[str, np.ndarray]:
            case.given["load_parameters"](start)
            case.given["new_step"]()(x, y)
            return case.arrays("parameters")

        one, two = moved(), moved()
        assert {name for name in start if np.array_equal(start[name], one[name])} == set()
        for name in start:
            np.testing.assert_allclose(one[name], two[name], atol=1e-6 if on_cpu() else 1e-4)
