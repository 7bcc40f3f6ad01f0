"""Generation beside what it could be: ``python tests/benchmarks/generation.py [--only tiny share batch first memory]``.

Each line of the table is a goal, with what was measured: the median of some rounds, in which what is compared takes
turns, each in a process of its own, so that what else the machine does falls on both. Weights are random: speed does
not depend on them. Needs no network; ``tiny`` needs mlx-lm (the parity extra).

tiny    decode of the preset tiny, bound by overhead, beside mlx-lm on the same folder (with the same BLAS), tokens/s
share   decode at GPT-2 124M's shape in float32: the speed at which it reads its weights, as a share of that at which
        products of a matrix with a vector read 512 MiB, MLX's or NumPy's, measured before and after in the same process
        (on stderr: the same of a step that is nothing but its products)
batch   eight prompts side by side beside one, at the same shape, tokens/s of all rows
first   from the start of ``mlx-gpt generate`` to the first of its tokens on stdout, after a prompt of 20, less the time
        that ``load`` takes; the same shape, a vocabulary of 50257
memory  the most memory that MLX held from loading on, beside weights and cache of 612 tokens; the same shape
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

import mlx_gpt  # noqa: F401  first: it lends MLX a fast BLAS, in mlx-lm's process too

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.stats import memory_speed
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import EOT

PROMPT = 20  # tokens
LOADED: dict[Path, tuple[GPT, Tokenizer]] = {}


def pairs_of_bytes() -> Tokenizer:
    """A vocabulary of GPT-2's size: all bytes, 50,000 pairs of them, and the mark of the end."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i // 256, i % 256]): 256 + i for i in range(50_000)}
    return Tokenizer(ranks, {EOT: 50_256})


def make_folders(where: Path) -> None:
    mx.random.seed(0)
    save(GPT(GPTConfig.preset("tiny", vocab_size=257)), Tokenizer.bytes(), where / "tiny")
    save(GPT(GPTConfig()), pairs_of_bytes(), where / "gpt2")


def generation(folder: Path, n: int, rows: int = 1, prompt: int = PROMPT) -> Generation:
    """A greedy run of n tokens for each row, which do not end before; done when this returns."""
    if folder not in LOADED:
        LOADED[folder] = load(folder)
    model, tokenizer = LOADED[folder]
    never = GenerationSettings(temperature=0, max_tokens=n, logit_bias={tokenizer.eot_id: -inf})
    run = Generation(model, tokenizer, [[65 + row] * prompt for row in range(rows)], never)
    for _ in run:
        pass
    return run


# One measurement each, in this process: a folder and a number of tokens -> a figure -----------------------------------


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
    """Seconds for the products of a step with its weights, with nothing between them; n steps, each after the other."""

    def products(x: mx.array) -> tuple[mx.array, mx.array]:
        C = x.shape[-1]
        for block in model.h:
            x = x @ block.attn.c_attn.weight.T
            x = x[:, :C] @ block.attn.c_proj.weight.T
            x = x @ block.mlp.c_fc.weight.T @ block.mlp.c_proj.weight.T
        logits = x @ model.head_weight.T
        return logits[:, :C] * 0 + 1, logits  # what was made smaller by each would in the end be slow to multiply

    step = mx.compile(products)
    steps = [step(mx.ones((1, model.config.n_embd)))]
    mx.eval(steps)
    started = time.perf_counter()
    for _ in range(n):
        steps = [*steps[-1:], step(steps[-1][0])]
        mx.async_eval(steps[-1])
        mx.eval(steps[0])  # as in a generation: while one is computed, the next is on its way
    mx.eval(steps)
    return (time.perf_counter() - started) / n


def numpys_speed() -> float:
    """Bytes a second at which NumPy's product of 512 MiB with a vector reads them."""
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
    """Seconds to the first line of the command's output."""
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
    """Bytes at most, as a multiple of what is needed."""
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

# The table ------------------------------------------------------------------------------------------------------------

GOALS: dict[str, tuple[str, str, tuple[str, ...], Callable[..., float], float, bool]] = {
    # what, its unit, what is measured, how that makes the figure, the goal, whether more is better
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
            apart(where, name, 0)  # the file is in memory from now on, and what is compiled is on disk
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
    parser.add_argument("--only", nargs="+", choices=GOALS, default=list(GOALS), help="these parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="to decode, instead of each part's own number")
    parser.add_argument("--measure", choices=MEASURES, help="one of them, here and now")
    parser.add_argument("--where", type=Path, help="the models, made before; else they are made for the run")
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
