"""The measured training speed is the tokens of the timed steps by their time, and leaves nothing behind."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest
from helpers.small_training import SMALL

from mlx_gpt.text.dataset import dataset_from_texts
from mlx_gpt.train import machine
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


def test_a_step_is_started_before_the_one_before_it_is_awaited_as_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_from_texts("letters", ["abc " * 100], ["abc " * 10], "bytes")
    events: list[str] = []
    number = iter(range(100))
    monkeypatch.setattr(speed_module, "make_train_step", lambda *_: (lambda *_: f"{next(number)}", []))
    monkeypatch.setattr(mx, "async_eval", lambda result, _: events.append(f"start {result}"))
    monkeypatch.setattr(mx, "eval", lambda result, *_: events.append(f"await {result}"))
    now = iter([0, 1, 1, 2, 2, 5])  # a step that compiles, one by which the others are counted, and those
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: next(now))
    measure_training_speed(SMALL, TrainConfig(batch_size=2), dataset, seconds=3)
    assert [event for event in events if event != "await None"][4:] == [
        *("start 2", "start 3", "await 2", "start 4", "await 3", "await 4"),
    ]


@pytest.mark.parametrize(
    ("bfloat16", "float16", "found"),
    [(1.9, 2.0, ("bfloat16", 1.9)), (0.6, 2.0, ("float16", 2.0)), (1.1, 1.1, None)],
)
def test_the_half_precision_that_multiplies_faster_is_offered(
    bfloat16: float, float16: float, found: tuple[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {mx.bfloat16: 1e12 * bfloat16, mx.float16: 1e12 * float16}
    monkeypatch.setattr(machine, "on_cpu", lambda: False)
    monkeypatch.setattr(machine, "matrix_speed", lambda dtype: speeds[dtype])
    assert machine.faster_dtype(1e12) == found
    monkeypatch.setattr(machine, "on_cpu", lambda: True)
    assert machine.faster_dtype(1e12) is None


def test_measuring_leaves_no_freed_memory_behind() -> None:
    dataset = dataset_from_texts("letters", ["abc " * 100], ["abc " * 10], "bytes")
    measure_training_speed(SMALL, TrainConfig(batch_size=2), dataset, seconds=0.0)
    assert mx.get_cache_memory() == 0
