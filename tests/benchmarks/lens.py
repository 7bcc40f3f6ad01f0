"""Time and memory of a trace relative to the plain forward pass: the 124M shape, one text of 128 tokens.

    python tests/benchmarks/lens.py [--rounds 5]

The three are computed in turn; the fastest round of each counts. Memory is the peak beyond the weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx_gpt  # isort: skip  # before MLX: it links OpenBLAS on Linux
import mlx.core as mx

from mlx_gpt.lens import trace

PATTERN = "blocks.3.attn.hook_pattern"


def measure(compute: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds that a computation takes and its peak memory in bytes."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - start, mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = mlx_gpt.GPT(mlx_gpt.GPTConfig()).eval()
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 128))
    mx.eval(model.parameters(), tokens)
    kinds: dict[str, Callable[[], Any]] = {
        "plain forward pass": lambda: model(tokens),
        f"{PATTERN} alone": lambda: trace(model, tokens, names=PATTERN)[1],
        "all 208 activations": lambda: trace(model, tokens),
    }
    measured: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, compute in kinds.items():
            measured[kind].append(measure(compute))
    plain = min(measured["plain forward pass"])
    for kind, runs in measured.items():
        seconds, memory = min(runs)
        print(
            f"{kind}: {seconds * 1000:.0f} ms, {seconds / plain[0]:.2f} of the plain one; "
            f"{memory / 1e6:.0f} MB, {memory / plain[1]:.2f} of it"
        )


if __name__ == "__main__":
    main()
