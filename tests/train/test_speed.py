"""The measured training speed is the tokens of the timed steps by their time, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
from helpers.small_training import SMALL

from mlx_gpt.text.dataset import dataset_from_texts
from mlx_gpt.train import speed as speed_module
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.speed import measure_training_speed


@pytest.mark.parametrize(("seconds", "n_steps"), [(0.1, 1), (3.0, 3), (1e9, 50)])
def test_training_speed_is_tokens_by_seconds_of_steps_that_last_as_long_as_asked(
    seconds: float, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_from_texts("letters", ["abc " * 100], ["abc " * 10], "bytes")
    now, n = 0.0, 0

    def one_step(*_: object) -> list[object]:
        nonlocal now, n
        now, n = now + (10.0 if n == 0 else 1.0), n + 1  # the first one compiles
        return []

    monkeypatch.setattr(speed_module, "make_train_step", lambda *_: (one_step, []))
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now)
    training = TrainConfig(batch_size=4, accumulate=2)
    assert measure_training_speed(SMALL, training, dataset, seconds) == 2 * 4 * SMALL.n_positions
    assert n == 2 + n_steps


def test_measuring_the_training_speed_ends_its_thread() -> None:
    dataset = dataset_from_texts("letters", ["abc " * 100], ["abc " * 10], "bytes")
    assert measure_training_speed(SMALL, TrainConfig(batch_size=2), dataset, seconds=0.0) > 0
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(timeout=2)
    assert "batches" not in [thread.name for thread in threading.enumerate()]
