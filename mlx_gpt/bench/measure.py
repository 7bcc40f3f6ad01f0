"""Measurements of training and generation: the sides take turns in rounds, after a warm-up; medians and spread."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.bench.graph import launches
from mlx_gpt.bench.sides import OURS, SIDES, Speak, Train
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import one_line
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
    budget: float = 270.0  # seconds of training and generation; what does not fit is skipped


class Round(NamedTuple):
    """A round of a side that has warmed up: what measures it and fills the results, and the seconds it may take."""

    measure: Callable[[], None]
    cost: float


Start = Callable[[float], Round]  # warms a side up; its rounds should take no more than so many seconds


def measure_training(
    names: list[str], work: Workload, seconds: float, limits: Found, progress: Progress, found: Found
) -> None:
    """Fill ``found`` with each side's tokens/s, seconds of its first step, peak memory and share of the limit."""
    config, B = work.training, work.batch_size
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (B, config.n_positions + 1), np.int32)
    best = max(limits["matrix_product"]["float32"].values()) if limits else 0.0

    def start(make: Callable[[Path, Any], Train], one: Found, share: float) -> Round:
        others = start_peak()
        train = make(folder, ids)
        one["first_step_seconds"] = seconds_of(train, 1)
        step = seconds_of(train, 1)
        one |= peak_since(others)
        steps, speeds = max(1, min(50, int(min(work.seconds, share) / step))), []

        def measure() -> None:
            speeds.append(steps * ids[:, 1:].size / seconds_of(train, steps))
            one.update(tokens_per_second=median(speeds), spread=[min(speeds), max(speeds)])
            if best:
                one["share_of_limit"] = median(speeds) * training_flops(config) / best

        return Round(measure, steps * step)

    with model_folder(config) as folder:
        makes = {name: SIDES[name].train for name in names}
        starts: dict[str, Start] = {
            name: partial(start, make, found.setdefault(name, {})) for name, make in makes.items() if make
        }
        in_turn(starts, work.rounds, seconds, lambda text: progress(f"training, {text}"), found)


def measure_generation(
    names: list[str], work: Workload, seconds: float, limits: Found, progress: Progress, found: Found
) -> None:
    """Fill ``found`` with each side's tokens/s of prompt and text, share of the memory's speed, and host time."""
    config = work.generation
    prompt = np.random.default_rng(0).integers(0, config.vocab_size - 1, work.prompt).tolist()

    def start(make: Callable[[Path, list[int]], Speak], one: Found, share: float) -> Round:
        others = start_peak()
        speak = make(folder, prompt)
        speak(4)
        one |= peak_since(others)
        started = time.perf_counter()
        _, rest = speak(4)
        prefill = time.perf_counter() - started - rest
        n = max(2, min(work.tokens, int(3 * (share - prefill) / rest)))
        speeds: list[tuple[float, float, float]] = []

        def measure() -> None:
            busy = time.thread_time()
            first, rest = speak(n)
            host = (time.thread_time() - busy) / n
            speeds.append((len(prompt) / first, (n - 1) / rest, host))
            prefills, decodes, hosts = zip(*speeds, strict=True)
            one.update(tokens=n, prefill_tokens_per_second=median(prefills), tokens_per_second=median(decodes))
            one["spread"] = [min(decodes), max(decodes)]
            one["host_seconds_per_token"] = median(hosts)  # of the thread that starts the steps
            if limits:
                one["share_of_limit"] = median(decodes) * read / limits["matrix_vector"]

        return Round(measure, prefill + n * rest / 3)

    with model_folder(config) as folder:
        model, tokenizer = load(folder)
        read = weight_bytes(model)
        found[OURS] = {"kernels_per_token": kernels_per_token(model, tokenizer, prompt)}
        makes = {name: SIDES[name].speak for name in names}
        starts: dict[str, Start] = {
            name: partial(start, make, found.setdefault(name, {})) for name, make in makes.items() if make
        }
        in_turn(starts, work.rounds, seconds, lambda text: progress(f"generation, {text}"), found)


def in_turn(
    starts: dict[str, Start],
    rounds: int,
    seconds: float,
    progress: Progress,
    found: Found,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Start the sides one after the other, each with a first round, and then measure them in turn, round by round.

    Each round has a share of the seconds left, and none begins that would end too late: a side without one has
    ``skipped`` in its results, with the reason. Only a side's warm-up can exceed the seconds, as it cannot be foreseen.
    """
    deadline = clock() + seconds
    running: dict[str, Round] = {}

    def measure(name: str, round_: Round, number: int) -> bool:
        if (started := clock()) + round_.cost > deadline:
            return False
        progress(f"{name}: round {number} of {rounds}")
        round_.measure()
        running[name] = round_._replace(cost=clock() - started)
        return True

    for i, (name, start) in enumerate(starts.items()):
        if (left := deadline - clock()) <= 0:
            found[name]["skipped"] = "no time was left"
            continue
        progress(f"{name}: warm-up")
        try:
            round_ = start(left / (len(starts) - i) / (rounds + 1))
            if not measure(name, round_, 1):
                found[name]["skipped"] = f"a round takes {round_.cost:.0f} s, more than was left"
        except Exception as error:  # of a peer's library: the others are measured all the same
            if name == OURS:
                raise
            found[name]["skipped"] = one_line(f"{type(error).__name__}: {error}")[:200]
    for number in range(2, rounds + 1):
        for name, round_ in list(running.items()):
            measure(name, round_, number)


def start_peak() -> int:
    """Start to record MLX's peak memory, and return the bytes that it holds for others."""
    mx.reset_peak_memory()
    return mx.get_active_memory()


def peak_since(others: int) -> Found:
    """Return the peak memory of a side in bytes; nothing for one that does not use MLX."""
    peak = mx.get_peak_memory() - others
    return {"peak_memory_bytes": peak} if peak > 0 else {}


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
