"""Measurements of training and generation: the sides take turns in rounds, after a warm-up; medians and spread."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.bench.graph import launches
from mlx_gpt.bench.sides import OURS, SIDES, Speak, Train
from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.history import History
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.stats import weight_bytes
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.machine import training_flops

Progress = Callable[[str], None]
Found = dict[str, Any]


class Workload(NamedTuple):
    """What is measured: the models, the batch, the tokens of a prompt and of its continuation, the rounds."""

    training: GPTConfig = GPTConfig(n_positions=256, n_embd=384, n_layer=6, n_head=6)
    batch_size: int = 8
    generation: GPTConfig = GPTConfig()  # GPT-2 124M
    prompt: int = 512
    tokens: int = 64
    rounds: int = 5
    seconds: float = 1.5  # of the steps that a side trains in a round
    limit: float = 80.0  # seconds of training, and of generation; then what is left is skipped, except ours


def measure_training(names: list[str], work: Workload, limits: Found, progress: Progress, found: Found) -> None:
    """Fill ``found`` with each side's tokens/s, seconds of its first step, peak memory and share of the limit."""
    config, B = work.training, work.batch_size
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (B, config.n_positions + 1), np.int32)
    best = max(limits["matrix_product"]["float32"].values()) if limits else 0.0
    tokens, deadline = B * config.n_positions, time.perf_counter() + work.limit
    with model_folder(config) as folder:
        runs: dict[str, Train] = {}
        steps: dict[str, int] = {}
        for name in names:
            if (train := SIDES[name].train) is None or (runs and time.perf_counter() > deadline):
                continue
            progress(f"training, {name}: first step")
            others = start_peak()
            runs[name] = train(folder, ids)
            found[name] = {"first_step_seconds": seconds_of(runs[name], 1)}
            steps[name] = max(1, min(50, round(work.seconds / seconds_of(runs[name], 1))))
            found[name] |= peak_since(others)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for name in in_turn(list(runs), work.rounds, deadline, lambda text: progress(f"training, {text}")):
            elapsed = seconds_of(runs[name], steps[name])
            speeds[name].append(steps[name] * tokens / elapsed)
            found[name] |= {"tokens_per_second": median(speeds[name]), "spread": [min(speeds[name]), max(speeds[name])]}
            if best:
                found[name]["share_of_limit"] = median(speeds[name]) * training_flops(config) / best


def measure_generation(names: list[str], work: Workload, limits: Found, progress: Progress, found: Found) -> None:
    """Fill ``found`` with each side's tokens/s of prompt and text, share of the memory's speed, and host time."""
    config, n = work.generation, work.tokens
    prompt = np.random.default_rng(0).integers(0, config.vocab_size - 1, work.prompt).tolist()
    deadline = time.perf_counter() + work.limit
    with model_folder(config) as folder:
        model, tokenizer = load(folder)
        read = weight_bytes(model)
        runs: dict[str, Speak] = {}
        for name in names:
            if (speak := SIDES[name].speak) is None or (runs and time.perf_counter() > deadline):
                continue
            progress(f"generation, {name}: loading and first tokens")
            others = start_peak()
            runs[name] = speak(folder, prompt)
            runs[name](4)
            found[name] = peak_since(others)
        found[OURS]["kernels_per_token"] = kernels_per_token(model, tokenizer, prompt)
        speeds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
        for name in in_turn(list(runs), work.rounds, deadline, lambda text: progress(f"generation, {text}")):
            busy = time.thread_time()
            first, rest = runs[name](n)
            host = (time.thread_time() - busy) / n
            speeds[name].append((len(prompt) / first, (n - 1) / rest, host))
            prefill, decode, host = (median(values) for values in zip(*speeds[name], strict=True))
            found[name] |= {
                "prefill_tokens_per_second": prefill,
                "tokens_per_second": decode,
                "spread": [min(one[1] for one in speeds[name]), max(one[1] for one in speeds[name])],
                "host_seconds_per_token": host,  # of the thread that starts the steps
            }
            if limits:
                found[name]["share_of_limit"] = decode * read / limits["matrix_vector"]


def start_peak() -> int:
    """Start to record MLX's peak memory, and return the bytes that it holds for others."""
    mx.reset_peak_memory()
    return mx.get_active_memory()


def peak_since(others: int) -> Found:
    """Return the peak memory of a side in bytes; nothing for one that does not use MLX."""
    peak = mx.get_peak_memory() - others
    return {"peak_memory_bytes": peak} if peak > 0 else {}


def in_turn(names: list[str], rounds: int, deadline: float, progress: Progress) -> Iterator[str]:
    """Yield the names in turn, round by round; after the deadline no round begins but the first."""
    for number in range(rounds):
        if number and time.perf_counter() > deadline:
            return
        for name in names:
            progress(f"{name}: round {number + 1} of {rounds}")
            yield name


def kernels_per_token(model: GPT, tokenizer: Tokenizer, prompt: list[int]) -> int:
    """Count the kernels of a greedy step of ours; on a CPU, its operations."""
    run = Generation(model, tokenizer, [prompt], GenerationSettings(temperature=0, ignore_eos=True))
    mx.eval(run.read_prompt(), run.decoder.state())
    results = run.decoder.step_and_choose(
        mx.array(prompt[:1]), run.sampler.choose, run.sampler.inputs(History(run.prompts, run.limits))
    )
    return launches((results, run.decoder.state()))


@contextmanager
def model_folder(config: GPTConfig) -> Iterator[Path]:
    """Write a model with random weights, and a vocabulary of its size, to a temporary folder."""
    mx.random.seed(0)
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i // 256, i % 256]): 256 + i for i in range(config.vocab_size - 257)}
    with tempfile.TemporaryDirectory() as folder:
        save(GPT(config), Tokenizer(ranks, {EOT: config.vocab_size - 1}), Path(folder) / "model")
        yield Path(folder) / "model"


def seconds_of(train: Train, steps: int) -> float:
    started = time.perf_counter()
    train(steps)
    return time.perf_counter() - started
