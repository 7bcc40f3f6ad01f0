"""What ``train/defaults`` needs to know, measured, and what it picked, shown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_gpt.text.dataset import Dataset, text_size
from mlx_gpt.train.auto.defaults import pick, pick_rate
from mlx_gpt.train.auto.model_size import STEP, Measured, Pick, Text, architecture, pick_tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import size, smallest
from mlx_gpt.train.machine import Machine, measure, seconds_per_token
from mlx_gpt.train.memory import check_memory
from mlx_gpt.train.speed import measure_training_speed

if TYPE_CHECKING:
    from rich.console import Console

Group = mx.distributed.Group | None
Settings = Mapping[str, Any]  # n_layer -> 4
TRIAL = 0.02  # of the time, for the steps that are timed


def measure_machines(group: Group) -> Machine:
    """This machine; in a group the slowest at each, the same in all processes, since each step waits for it."""
    speeds = smallest(list(measure()), group)
    return Machine(speeds[0], speeds[1], int(speeds[2]))


def pick_tokenizer_for(data: str, machine: Machine, seconds: float) -> Pick:
    """The vocabulary for a text that has not been read yet."""
    if data == "tinyworld":
        return Pick({"tokenizer": "bpe:1024"}, "nearly every word of tinyworld is one of its ids")
    return pick_tokenizer(text_size(data), machine, seconds)


def plan(
    dataset: Dataset,
    machine: Machine | None,
    deadline: float,
    given: Settings,
    group: Group = None,
    tuning: bool = False,
) -> list[Pick]:
    """The settings that are not ``given``, for a run that ends at ``deadline``, at the speed of real steps.

    A model is chosen by what the machine does in products alone, tried, and chosen again if its speed says that
    another one suits the time better. In a group all processes come to the same. Without a ``machine`` so much is given
    that its speed has no say.
    """
    text = Text(dataset.train.n_tokens, dataset.val.n_tokens, dataset.tokenizer.vocab_size)
    n, as_found, measured = size(group), machine, None
    if machine is None or as_found is None:
        return pick_rate(text, given, n, tuning)

    def seconds() -> float:
        return max(1.0, *smallest([deadline - time.perf_counter()], group))

    for _ in range(2):
        picks = pick(text, machine, seconds(), given, processes=n, tuning=tuning)
        settings = {**given, **flags_of(picks)}
        config = architecture(settings, text.vocab_size)
        if measured and config == measured.config:
            break
        training = training_of(settings)
        check_memory(config, training, as_found.memory)
        speed = measure_training_speed(config, training, dataset, TRIAL * seconds(), group)
        measured = Measured(config, speed)
        share = speed / n * seconds_per_token(config, as_found, STEP)
        machine = Machine(share * as_found.matrix_speed, share * as_found.element_speed, as_found.memory)
    return pick(text, machine, seconds(), given, measured=measured, processes=n, tuning=tuning)


def training_of(settings: Settings) -> TrainConfig:
    """How to train, of all settings of a run."""
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in settings.items() if name in known})


def flags_of(picks: Sequence[Pick]) -> dict[str, Any]:
    """What was picked, by the names of the flags."""
    return {name: value for one in picks for name, value in one.settings.items()}


def show(picks: Sequence[Pick], console: Console) -> None:
    """One table: what was picked, by the flags that would change it, and why."""
    from rich.table import Table

    if not picks:
        return
    table = Table(title="picked, since it was not given", title_justify="left", box=None, show_header=False)
    for style in ("bold", "", "dim"):
        table.add_column(style=style)
    for one in picks:
        for i, (name, value) in enumerate(one.settings.items()):
            table.add_row(f"--{name.replace('_', '-')}", str(value), one.why if i == 0 else "")
    console.print(table)
