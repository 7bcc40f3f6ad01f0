"""Training beside mlx-lm: ``python tests/benchmarks/training.py small`` (or ``gpt2``, ``memory``); the parity extra.

Both train the same GPT-2 on the same random ids with AdamW in float32, in a step that is compiled alike: ours, and
mlx-lm's model under the step of MLX's documentation. Each measurement has a process of its own, ours and theirs in
turn, so that what else the machine does falls on both; printed is the median of the ratios.

``small``: 6 layers, 384 wide, T=256, B=8. ``gpt2``: 124M, T=256, B=4. Both with 50257 ids; tokens/s. ``memory``: 124M,
T=1024, B=2; the largest number of bytes in use at once, ours also with ``recompute``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx_gpt  # noqa: F401  # isort: skip  # before MLX, so that on Linux both sides multiply with OpenBLAS
import mlx.core as mx
import numpy as np

from mlx_gpt.bench.measure import model_folder
from mlx_gpt.bench.sides import mlx_lm_model, mlx_lm_step
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import TrainStep, make_train_step

SHAPES = {  # config, batch size
    "small": (GPTConfig(n_positions=256, n_embd=384, n_layer=6, n_head=6), 8),
    "gpt2": (GPTConfig(n_positions=256), 4),
    "memory": (GPTConfig(), 2),
}


def our_step_and_state(config: GPTConfig, batch_size: int, recompute: bool) -> tuple[TrainStep, Any]:
    training = TrainConfig(learning_rate=1e-4, batch_size=batch_size, recompute=recompute)
    return make_train_step(GPT(config), make_optimizer(training, config.n_head), training)


def their_step_and_state(config: GPTConfig) -> tuple[TrainStep, Any]:
    with model_folder(config) as folder:
        return mlx_lm_step(mlx_lm_model(folder))


def measure(shape: str, side: str, steps: int) -> float:
    """Tokens/s of some steps after the first; for ``memory`` the peak of them in bytes."""
    config, B = SHAPES[shape]
    if shape == "memory":  # MLX then frees at once, and the peak is what the step needs
        mx.set_memory_limit(1)
        mx.set_cache_limit(0)
    step, state = (
        their_step_and_state(config) if side == "mlx-lm" else our_step_and_state(config, B, side == "recompute")
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (B, config.n_positions + 1), np.int32)
    x, y = mx.array(ids[:, :-1]), mx.array(ids[:, 1:])
    mx.eval(step(x, y), state)
    mx.reset_peak_memory()
    started = time.perf_counter()
    for _ in range(steps):
        mx.eval(step(x, y), state)
    if shape == "memory":
        return float(mx.get_peak_memory())
    return steps * x.size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--side", choices=["ours", "recompute", "mlx-lm"], help="measure one of them, here and now")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    if flags.side:
        print(json.dumps(measure(flags.shape, flags.side, flags.steps)))
        return

    def apart(side: str) -> float:
        command = [sys.executable, __file__, flags.shape, "--side", side, "--steps", str(flags.steps)]
        return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    sides = ["ours", "recompute"] if flags.shape == "memory" else ["ours"]
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(1 if flags.shape == "memory" else flags.rounds):
        for side in sides:
            ours, theirs = apart(side), apart("mlx-lm")
            ratios[side].append(ours / theirs)
            print(f"{side} {ours:,.0f}, mlx-lm {theirs:,.0f}: {ours / theirs:.2f}", flush=True)
    for side, values in ratios.items():
        print(f"{flags.shape}, {side}: {statistics.median(values):.2f} of mlx-lm (median)")


if __name__ == "__main__":
    main()
