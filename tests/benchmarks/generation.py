"""Measure generation against goals: ``python tests/benchmarks/generation.py [--only tiny share batch first memory]``.

Each line of the table is a goal and the median of some rounds. Measurements that are compared alternate, each in a new
process. Weights are random, since speed does not depend on them. Needs no network; ``tiny`` needs mlx-lm (the parity
extra).

tiny    decoding of the preset tiny, bound by overhead, relative to mlx-lm on the same folder and BLAS, tokens/s
share   decoding at GPT-2 124M's shape in float32: the speed at which it reads its weights, relative to that at which
        matrix-vector products of 512 MiB, MLX's or NumPy's, read theirs, before and after in the same process
        (on stderr: the same for a step that consists of its products only)
batch   a batch of eight prompts relative to one, at the same shape, tokens/s of all rows
first   seconds from the start of ``mlx-gpt generate`` to its first token on stdout, after a prompt of 20, less the time
        of ``load``; the same shape, a vocabulary of 50257
memory  MLX's peak memory from loading on, relative to weights and cache of 612 tokens; the same shape
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import mlx_gpt  # noqa: F401  first: it links MLX to a fast BLAS, in mlx-lm's process too

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.stats import memory_speed
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer

PROMPT = 20  # tokens
LOADED: dict[Path, tuple[GPT, Tokenizer]] = {}


def pairs_of_bytes() -> Tokenizer:
    """Return a vocabulary of GPT-2's size: all bytes, 50,000 pairs of them, and ``<|endoftext|>``."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i // 256, i % 256]): 256 + i for i in range(50_000)}
    return Tokenizer(ranks, {EOT: 50_256})


def make_folders(where: Path) -> None:
    mx.random.seed(0)
    save(GPT(GPTConfig.preset("tiny", vocab_size=257)), Tokenizer.bytes(), where / "tiny")
    save(GPT(GPTConfig()), pairs_of_bytes(), where / "gpt2")


def generation(folder: Path, n: int, rows: int = 1, prompt: int = PROMPT) -> Generation:
    """Run a greedy generation of exactly n tokens per row."""
    if folder not in LOADED:
        LOADED[folder] = load(folder)
    model, tokenizer = LOADED[folder]
    never = GenerationSettings(temperature=0, max_tokens=n, logit_bias={tokenizer.eot_id: -inf})
    run = Generation(model, tokenizer, [[65 + row] * prompt for row in range(rows)], never)
    for _ in run:
        pass
    return run


# Measurements in this process: a folder and a number of tokens -> a figure


def tiny_ours(where: Path, n: int) -> float:
    generation(where / "tiny", n)  # to warm up
    return generation(where / "tiny", n).stats.speed


def tiny_mlx_lm(where: Path, n: int) -> float:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(where / "tiny"))
    never = {"logits_processors": [lambda ids, logits: logits + mx.where(mx.arange(257) == 256, -mx.inf, 0)]}
    for options in (never, never):  # the first to warm up
        started, count = 0.0, -1  # as ours: from the first token on
        for _ in mlx_lm.stream_generate(model, tokenizer, [65] * PROMPT, max_tokens=n, **options):
            count += 1
            started = started or time.perf_counter()
        speed = count / (time.perf_counter() - started)
    return speed


def share(where: Path, n: int) -> float:
    generation(where / "gpt2", 5)
    before = max(memory_speed(131_072), numpys_speed())
    run = generation(where / "gpt2", n)
    alone = run.stats.weight_bytes / products_alone(LOADED[where / "gpt2"][0], n)
    speed = max(before, memory_speed(131_072))
    print(
        f"  {run.stats.speed:.1f} tokens/s, matrix with vector {speed / 1e9:.1f} GB/s, "
        f"a step's products alone {alone / speed:.3f} of it",
        file=sys.stderr,
    )
    return run.stats.memory_share(speed)


def products_alone(model: GPT, n: int) -> float:
    """Return the seconds per step for the products with the weights only, over n dependent steps."""

    def products(x: mx.array) -> tuple[mx.array, mx.array]:
        C = x.shape[-1]
        for block in model.h:
            x = x @ block.attn.c_attn.weight.T
            x = x[:, :C] @ block.attn.c_proj.weight.T
            x = x @ block.mlp.c_fc.weight.T @ block.mlp.c_proj.weight.T
        logits = x @ model.head_weight.T
        return logits[:, :C] * 0 + 1, logits  # repeated products would end in denormal numbers, which are slow

    step = mx.compile(products)
    steps = [step(mx.ones((1, model.config.n_embd)))]
    mx.eval(steps)
    started = time.perf_counter()
    for _ in range(n):
        steps = [*steps[-1:], step(steps[-1][0])]
        mx.async_eval(steps[-1])
        mx.eval(steps[0])  # as in a generation, the next step is queued while one is computed
    mx.eval(steps)
    return (time.perf_counter() - started) / n


def numpys_speed() -> float:
    """Return the bytes per second at which NumPy's product of a 512 MiB matrix with a vector reads it."""
    matrix, x = np.ones((131_072, 1024), np.float32), np.ones(1024, np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ x
        times.append(time.perf_counter() - started)
    return matrix.nbytes / min(times)


def batch_of(rows: int) -> Callable[[Path, int], float]:
    def measure(where: Path, n: int) -> float:
        generation(where / "gpt2", 5, rows)
        return generation(where / "gpt2", n, rows).stats.speed

    return measure


def first(where: Path, n: int) -> float:
    """Return the seconds until the first line of the command's output."""
    flags = ["--prompt", " a" * PROMPT, "--max-tokens", "2", "--json", "--no-figures"]
    started = time.perf_counter()
    command = [sys.executable, "-m", "mlx_gpt", "generate", str(where / "gpt2"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["sample"] == 0
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


def loading(where: Path, n: int) -> float:
    started = time.perf_counter()
    load(where / "gpt2")
    return time.perf_counter() - started


def memory(where: Path, n: int) -> float:
    """Return the peak memory as a multiple of weights and cache."""
    run = generation(where / "gpt2", 100, prompt=512)
    model = run.decoder.model
    cache = 2 * model.config.n_layer * model.config.n_embd * 4 * 612
    return run.stats.peak_memory / (4 * model.n_parameters + cache)


MEASURES: dict[str, Callable[[Path, int], float]] = {
    "tiny": tiny_ours,
    "mlx-lm": tiny_mlx_lm,
    "share": share,
    "batch 8": batch_of(8),
    "batch 1": batch_of(1),
    "first": first,
    "loading": loading,
    "memory": memory,
}

# The table

GOALS: dict[str, tuple[str, str, tuple[str, ...], Callable[..., float], float, bool]] = {
    # label, unit, measurements, figure computed from them, goal, True if more is better
    "tiny": ("decode, tiny model", "x mlx-lm", ("tiny", "mlx-lm"), lambda ours, theirs: ours / theirs, 1.5, True),
    "share": ("decode, 124M", "of matrix x vector", ("share",), lambda found: found, 0.9, True),
    "batch": ("batch 8, 124M", "x batch 1", ("batch 8", "batch 1"), lambda eight, one: eight / one, 4.0, True),
    "first": ("first token, 124M", "s beyond loading", ("first", "loading"), lambda all, load: all - load, 0.6, False),
    "memory": ("peak memory, 124M", "x weights + cache", ("memory",), lambda found: found, 1.15, False),
}
TOKENS = {"tiny": 200, "mlx-lm": 200, "share": 60, "batch 8": 40, "batch 1": 40}


def apart(where: Path, name: str, n: int) -> float:
    command = [sys.executable, __file__, "--measure", name, "--where", str(where), "--tokens", str(n)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def rows(where: Path, parts: list[str], rounds: int, tokens: int | None) -> Iterator[str]:
    for part in parts:
        what, unit, names, figure, goal, more = GOALS[part]
        for name in names if part == "first" else ():
            apart(where, name, 0)  # warms the page cache and the cache of compiled kernels
        figures = []
        for _ in range(rounds):
            found = [apart(where, name, tokens or TOKENS.get(name, 0)) for name in names]
            figures.append(figure(*found))
            print(f"{part}: {', '.join(f'{n} {x:.4g}' for n, x in zip(names, found, strict=True))}", file=sys.stderr)
        median = statistics.median(figures)
        reached = "reached" if (median >= goal if more else median <= goal) else "NOT reached"
        bound = f"{'at least' if more else 'at most'} {goal:g}"
        yield f"{what:20} {median:8.3f} {unit:20} {bound:14} {reached}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GOALS, default=list(GOALS), help="measure these parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="tokens to decode, instead of each part's default")
    parser.add_argument("--measure", choices=MEASURES, help="run one measurement in this process")
    parser.add_argument("--where", type=Path, help="a folder with the models, written if missing; temporary by default")
    flags = parser.parse_args()
    if flags.measure:
        print(MEASURES[flags.measure](flags.where, flags.tokens))
        return
    with tempfile.TemporaryDirectory() as folder:
        where = flags.where or Path(folder)
        if not (where / "gpt2").exists():
            make_folders(where)
        table = list(rows(where, flags.only, flags.rounds, flags.tokens))
    print(f"{'':20} {'measured':8} {'':20} goal")
    print("\n".join(table))


if __name__ == "__main__":
    main()
