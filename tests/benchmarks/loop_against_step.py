"""The cost of the training loop relative to the bare step: ``python tests/benchmarks/loop_against_step.py``.

The model is nanoGPT's for a CPU (4 layers, 4 heads, width 128, windows of 64, batches of 12), whose step is short: the
shorter the step, the more the loop weighs. Loop and step take turns, ten steps each, so that whatever else the machine
does meets both; the medians are compared. The loop is that of ``mlx-gpt train`` with evaluation off: data, metrics on
disk, progress. The step has one batch, which is in memory. A checkpoint is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx_gpt  # noqa: F401  # isort: skip  # before MLX, so that on Linux it multiplies with OpenBLAS
import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_gpt.config import GPTConfig
from mlx_gpt.store.checkpoint import CheckpointManager
from mlx_gpt.text.dataset import Dataset, dataset_from_texts
from mlx_gpt.tinyworld import stories as tinyworld
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loop import Trainer
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.report.metrics import RunReport
from mlx_gpt.train.run import new_model
from mlx_gpt.train.step import make_train_step

NANO = GPTConfig.preset("tiny", n_positions=64)
CONFIG = TrainConfig(steps=10**6, batch_size=12, eval_every=0)
BLOCK = 10  # steps


def bare_steps(dataset: Dataset) -> Callable[[], None]:
    """A block of bare steps."""
    model = new_model(NANO, dataset, seed=0)
    step, state = make_train_step(model, make_optimizer(CONFIG, NANO.n_head), CONFIG)
    rows = np.random.default_rng(0).integers(0, 257, (CONFIG.batch_size, NANO.n_positions + 1), np.int32)
    x, y = mx.array(rows[:, :-1]), mx.array(rows[:, 1:])

    def block() -> None:
        for _ in range(BLOCK):
            mx.eval(step(x, y), state)

    return block


def looped_steps(trainer: Trainer) -> Callable[[], None]:
    """A block of the loop's steps, written down."""

    def block() -> None:
        for _ in range(BLOCK):
            trainer.advance()
        trainer.synchronize()

    return block


def seconds(block: Callable[[], None]) -> float:
    started = time.perf_counter()
    block()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40)
    flags = parser.parse_args()
    stories = tinyworld.generate_stories(2000, seed=0)
    dataset = dataset_from_texts("tinyworld", stories[:1990], stories[1990:], "bytes")
    with tempfile.TemporaryDirectory() as folder:
        report = RunReport(Path(folder), Console(quiet=True))
        checkpoints = CheckpointManager(Path(folder), dataset.tokenizer)
        model = new_model(NANO, dataset, seed=0)
        trainer = Trainer(model, dataset.train, dataset.val, CONFIG, report, checkpoints=checkpoints)
        bare, looped = bare_steps(dataset), looped_steps(trainer)
        bare(), looped()  # these compile
        both = [(seconds(bare), seconds(looped)) for _ in range(flags.blocks)]
        checkpoint = statistics.median(seconds(trainer.save_checkpoint) for _ in range(5))
        report.close()
    step, loop = (statistics.median(times) / BLOCK for times in zip(*both, strict=True))
    share = statistics.median(one / other for one, other in both)
    print(f"step {1000 * step:.2f} ms, loop {1000 * loop:.2f} ms: the loop reaches {step / loop:.1%}")
    print(f"(median of the pairs' ratios: {share:.1%})")
    print(
        f"a checkpoint takes {1000 * checkpoint:.0f} ms, {checkpoint / step / CONFIG.checkpoint_every:.1%} of 250 steps"
    )


if __name__ == "__main__":
    main()
