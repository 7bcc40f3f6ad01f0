"""Default hyperparameters at the measured speed of this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_gpt.text.corpora import CORPORA, GeneratedCorpus
from mlx_gpt.text.dataset import Dataset
from mlx_gpt.text.records import TEXT
from mlx_gpt.text.sources import find_sources
from mlx_gpt.train.auto.defaults import choose, choose_learning_rate
from mlx_gpt.train.auto.model_size import (
    TYPICAL_STEP,
    Choice,
    TextSize,
    architecture,
    choose_tokenizer,
)
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import group_min, size
from mlx_gpt.train.machine import Machine, measure_machine, seconds_per_token
from mlx_gpt.train.memory import check_memory
from mlx_gpt.train.speed import measure_training_speed

if TYPE_CHECKING:
    from rich.console import Console

TRIAL_SHARE = 0.02  # of the time left, for timing steps


def measure_slowest(group: mx.distributed.Group | None) -> Machine:
    """Measure this machine; in a group, return the slowest values, because each step waits for them."""
    matrix_speed, element_speed, memory = group_min(list(measure_machine()), group)
    return Machine(matrix_speed, element_speed, int(memory))


def tokenizer_for(data: str, machine: Machine, seconds: float, text_field: str = TEXT) -> Choice:
    """Choose the vocabulary for a text that has not been read yet."""
    if isinstance(corpus := CORPORA.get(data), GeneratedCorpus):
        return Choice({"tokenizer": corpus.tokenizer}, f"the default for {data}")
    return choose_tokenizer(find_sources([data], text_field=text_field).n_bytes, machine, seconds)


def plan(
    dataset: Dataset,
    machine: Machine | None,
    deadline: float,
    given: Mapping[str, Any],
    group: mx.distributed.Group | None = None,
    tuning: bool = False,
) -> list[Choice]:
    """Choose the settings that are not ``given``, for a run that ends at ``deadline`` (of ``time.perf_counter``).

    Chooses a model by the speed of ``machine``, measures its training speed, and chooses again with that. All processes
    of a group make the same choices. Without a ``machine`` only the learning rate is open.
    """
    text = TextSize(dataset.train.n_tokens, dataset.val.n_tokens, dataset.tokenizer.vocab_size)
    if machine is None:
        return choose_learning_rate(text, given, size(group), tuning)
    original, measured = machine, None
    open_choices = partial(choose, text, given=given, processes=size(group), tuning=tuning)

    def seconds() -> float:
        return max(1.0, *group_min([deadline - time.perf_counter()], group))

    for _ in range(2):
        choices = open_choices(machine, seconds())
        settings = {**given, **settings_of(choices)}
        config, training = architecture(settings, text.vocab_size), TrainConfig.of(settings)
        if config == measured:
            break
        check_memory(config, training, original.memory)
        speed = measure_training_speed(config, training, dataset, TRIAL_SHARE * seconds(), group)
        measured = config
        factor = speed / size(group) * seconds_per_token(config, original, TYPICAL_STEP)
        machine = Machine(factor * original.matrix_speed, factor * original.element_speed, original.memory)
    return open_choices(machine, seconds(), model=measured)


def settings_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the settings of all choices."""
    return {name: value for choice in choices for name, value in choice.settings.items()}


def print_choices(choices: Sequence[Choice], console: Console) -> None:
    """Print a table of the chosen values, by the flags that change them, with reasons."""
    from rich.table import Table

    if not choices:
        return
    table = Table(title="chosen automatically", title_justify="left", box=None, show_header=False)
    for style in ("bold", "", "dim"):
        table.add_column(style=style)
    for choice in choices:
        for i, (name, value) in enumerate(choice.settings.items()):
            table.add_row(f"--{name.replace('_', '-')}", str(value), choice.reason if i == 0 else "")
    console.print(table)
