"""The speed of training, measured in real steps."""

from __future__ import annotations

import time
from contextlib import closing

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import first_reported
from mlx_gpt.text.batches import Batches
from mlx_gpt.text.dataset import Dataset
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import group_min, rank, size
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.run import new_model
from mlx_gpt.train.step import make_train_step

MAX_STEPS = 50


def measure_training_speed(
    config: GPTConfig,
    training: TrainConfig,
    dataset: Dataset,
    seconds: float,
    group: mx.distributed.Group | None = None,
) -> float:
    """Return the tokens/s that all processes of ``group`` train together on a new model, which is discarded.

    Times steps for about ``seconds``, and at most ``MAX_STEPS``, after one that compiles. As in the training loop,
    a step is started before the one before it is awaited. The slowest process counts.
    """
    speed = _measure(config, training, dataset, seconds, group)
    mx.clear_cache()  # MLX keeps freed memory
    mx.reset_peak_memory()
    return speed


def _measure(
    config: GPTConfig, training: TrainConfig, dataset: Dataset, seconds: float, group: mx.distributed.Group | None
) -> float:
    T, B = config.n_positions, training.batch_size
    model = new_model(config, dataset, training.seed)
    optimizer = make_optimizer(training, config.n_head)
    with closing(Batches(dataset.train, T, B, training.seed, 0, rank(group), size(group))) as batches:
        step, state = make_train_step(model, optimizer, training, group)

        def time_steps(n: int) -> float:
            started, previous = time.perf_counter(), None
            for _ in range(n):
                results = step(*map(mx.array, batches.for_step(training.accumulate)))
                mx.async_eval(results, state)
                mx.eval(previous)
                previous = results
            mx.eval(previous, state)
            return -group_min([started - time.perf_counter()], group)[0]

        with first_reported("step"):
            time_steps(1)
        n = max(1, min(MAX_STEPS, round(seconds / time_steps(1))))
        elapsed = time_steps(n)
    return size(group) * n * training.accumulate * B * T / elapsed
