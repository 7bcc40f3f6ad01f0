"""Default hyperparameters are deterministic, possible for every text, machine and time, and leave given ones alone."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import SMALL, TINY

from mlx_gpt.cli import main
from mlx_gpt.store.run_file import read_run_file
from mlx_gpt.tinyworld import stories as tinyworld
from mlx_gpt.train.auto import plan as plan_module
from mlx_gpt.train.auto.defaults import MAX_EPOCHS, MAX_TUNING_EPOCHS, choose
from mlx_gpt.train.auto.model_size import (
    MAX_WEIGHTS_PER_TOKEN,
    SIZE_FIELDS,
    Choice,
    TextSize,
    architecture,
    choose_tokenizer,
)
from mlx_gpt.train.auto.plan import settings_of
from mlx_gpt.train.config import LENGTHS, TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token
from mlx_gpt.train.memory import step_memory

LAPTOP = Machine(matrix_speed=4e9, element_speed=6e7, memory=8 << 30)  # a CPU with MLX's plain wheel
MACBOOK = Machine(matrix_speed=2e12, element_speed=5e9, memory=12 << 30)
STUDIO = Machine(matrix_speed=2e13, element_speed=5e10, memory=96 << 30)
BOOK = TextSize(train=400_000, val=45_000, vocab_size=1024)


def chosen(text: TextSize = BOOK, machine: Machine = MACBOOK, minutes: float = 10, **given: Any) -> dict[str, Any]:
    """All settings of a run: given and chosen."""
    flags = settings_of(choose(text, machine, 60 * minutes, given))
    assert not flags.keys() & given.keys()
    return {**flags, **given}


def tokens(settings: dict[str, Any]) -> int:
    return settings["steps"] * settings["batch_size"] * settings["accumulate"] * settings["n_positions"]


# Any text, machine and time


@pytest.mark.parametrize("machine", [LAPTOP, MACBOOK, STUDIO])
@pytest.mark.parametrize("n_tokens", [20, 1000, 40_000, 10**6, 10**8, 10**10])
def test_choices_are_possible_for_every_text_machine_and_time(n_tokens: int, machine: Machine) -> None:
    for minutes, vocab_size in product((0.2, 2, 10, 600), (257, 8192, 50257)):
        text = TextSize(n_tokens, max(1, n_tokens // 9), vocab_size)
        settings = chosen(text, machine, minutes)
        config, training = architecture(settings, vocab_size), TrainConfig.of(settings)  # both validate
        assert config.n_positions <= n_tokens
        assert step_memory(config, training) <= machine.memory
        assert tokens(settings) <= 1.5 * MAX_EPOCHS * n_tokens + training.batch_size * config.n_positions
        assert training.minutes is not None
        assert training.minutes <= max(1.2 * minutes, 0.4)
        assert 1e-4 < training.learning_rate <= 1e-2
        assert training.eval_every * 2 <= training.steps or training.steps < 8


def test_the_same_input_leads_to_the_same_choices_each_with_a_reason() -> None:
    first, second = (choose(BOOK, MACBOOK, 600, {}) for _ in range(2))
    assert first == second
    assert all(choice.reason for choice in first)
    assert {*SIZE_FIELDS, "batch_size", "steps", "learning_rate"} <= settings_of(first).keys()


def test_a_faster_machine_and_more_time_lead_to_larger_models_and_more_tokens() -> None:
    large = TextSize(10**9, 10**8, 4096)
    runs = [chosen(large, machine, minutes) for machine in (LAPTOP, MACBOOK, STUDIO) for minutes in (2, 10, 60)]
    for slower, faster in ((0, 1), (1, 2), (0, 3), (3, 4), (4, 5), (3, 6), (6, 7), (7, 8)):
        assert tokens(runs[slower]) < tokens(runs[faster])
        weights = [matrix_weights(architecture(runs[i], 4096)) for i in (slower, faster)]
        assert weights[0] <= weights[1]
    assert matrix_weights(architecture(runs[0], 4096)) * 50 < matrix_weights(architecture(runs[8], 4096))


@pytest.mark.parametrize("machine", [LAPTOP, MACBOOK, STUDIO])
def test_with_enough_text_a_model_sees_about_twenty_tokens_per_weight(machine: Machine) -> None:
    settings = chosen(TextSize(10**9, 10**8, 1024), machine, 30)
    assert 6 < tokens(settings) / matrix_weights(architecture(settings, 1024)) < 60


def test_a_small_text_leads_to_a_small_model_dropout_and_early_stopping() -> None:
    small, large = chosen(TextSize(50_000, 5_000, 257), STUDIO), chosen(TextSize(10**9, 10**8, 257), STUDIO)
    weights = [matrix_weights(architecture(settings, 257)) for settings in (small, large)]
    assert weights[0] <= MAX_WEIGHTS_PER_TOKEN * 50_000 < weights[1]
    assert small["resid_pdrop"] == small["embd_pdrop"] == 0.2
    assert small["patience"] > 0
    assert not {"resid_pdrop", "patience"} & large.keys()


def test_the_time_limit_includes_evaluations() -> None:
    """Steps at the measured speed and evaluations together take nearly all of ten minutes, and no more."""
    config = architecture(chosen(), BOOK.vocab_size)
    for speed in (2_000.0, 50_000.0):
        factor = speed * seconds_per_token(config, MACBOOK, 4096)
        machine = Machine(factor * MACBOOK.matrix_speed, factor * MACBOOK.element_speed, MACBOOK.memory)
        settings = settings_of(choose(BOOK, machine, 600, {}, model=config))
        steps_take = tokens(settings) / speed
        n_evaluations = settings["steps"] // settings["eval_every"]
        evaluated = n_evaluations * settings["eval_windows"] + settings.get(
            "final_windows", BOOK.val / config.n_positions
        )
        takes = steps_take + evaluated * config.n_positions / (2 * speed)
        assert takes < 600
        assert takes > 540 or tokens(settings) > (MAX_EPOCHS - 1) * BOOK.train


def test_a_large_validation_text_is_evaluated_in_part() -> None:
    settings = chosen(TextSize(10**9, 10**8, 1024), LAPTOP)
    assert 0 < settings["final_windows"] * settings["n_positions"] < 10**6
    assert "final_windows" not in chosen(machine=STUDIO)


# Given settings


@pytest.mark.parametrize(
    "given",
    [
        {"n_layer": 3},
        {"n_embd": 90},
        {"n_head": 7},
        {"n_head": 5, "n_embd": 40},
        {"n_positions": 17},
        {"batch_size": 3},
        {"accumulate": 4},
        {"steps": 7},
        {"tokens": 5000},
        {"epochs": 0.5},
        {"learning_rate": 1e-5, "optimizer": "adamw"},
        {"eval_every": 0},
        {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16},
    ],
    ids=str,
)
def test_given_settings_stay_and_the_others_fit_them(given: dict[str, Any]) -> None:
    settings = chosen(**given)
    assert {name: settings[name] for name in given} == given
    architecture(settings, BOOK.vocab_size)
    TrainConfig.of(settings)
    assert len(settings.keys() & {*LENGTHS}) == 1


def test_a_given_length_leaves_evaluations_and_a_given_size_dropout_alone() -> None:
    assert not {"eval_every", "patience", "minutes"} & chosen(steps=100).keys()
    size = {name: getattr(SMALL, name) for name in SIZE_FIELDS}
    assert "resid_pdrop" not in chosen(TextSize(1000, 100, 257), STUDIO, **size)


def test_no_setting_of_muon_is_chosen_for_another_optimizer() -> None:
    assert "muon_iterations" in chosen()
    assert "muon_iterations" not in chosen(optimizer="adamw")


def test_several_processes_share_a_step_and_have_no_time_limit() -> None:
    one = settings_of(choose(BOOK, MACBOOK, 600, {}))
    four = settings_of(choose(BOOK, MACBOOK, 600, {}, processes=4))
    assert "minutes" in one
    assert "minutes" not in four
    assert four["batch_size"] < one["batch_size"] * 2


def test_a_pretrained_model_is_tuned_with_a_low_learning_rate_for_few_epochs() -> None:
    size = {name: getattr(SMALL, name) for name in SIZE_FIELDS}
    scratch, tuned = (settings_of(choose(BOOK, STUDIO, 600, size, tuning=tuning)) for tuning in (False, True))
    assert tuned["learning_rate"] < scratch["learning_rate"] / 4
    assert tokens({**tuned, **size}) <= (MAX_TUNING_EPOCHS + 1) * BOOK.train
    assert "optimizer" not in tuned


# The tokenizer


def test_more_text_leads_to_more_ids_but_no_head_larger_than_the_blocks() -> None:
    def ids(n_bytes: int, machine: Machine, minutes: float = 10) -> int:
        spec = choose_tokenizer(n_bytes, machine, 60 * minutes).settings["tokenizer"]
        return 257 if spec == "bytes" else int(spec.removeprefix("bpe:"))

    assert [ids(n, STUDIO) for n in (0, 10_000, 500_000, 600_000, 1_100_000, 10**7, 10**9)] == sorted(
        ids(n, STUDIO) for n in (0, 10_000, 500_000, 600_000, 1_100_000, 10**7, 10**9)
    )
    assert ids(100_000, STUDIO) == 257
    assert ids(1_100_000, STUDIO) == 1024
    assert ids(10**9, LAPTOP, 2) <= 1024 < ids(10**9, STUDIO)


# Runs without settings


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that records each measurement."""
    recorded: list[str] = []

    def measure() -> Machine:
        recorded.append("machine")
        return Machine(4e9, 6e7, 8 << 30)

    speed = plan_module.measure_training_speed
    monkeypatch.setattr(plan_module, "measure_machine", measure)
    monkeypatch.setattr(
        plan_module, "measure_training_speed", lambda *arguments: (recorded.append("speed"), speed(*arguments))[1]
    )
    return recorded


@pytest.fixture
def book(here: Path) -> str:
    (here / "book.txt").write_text("\n".join(tinyworld.generate_stories(60, seed=1)))
    return "book.txt"


def test_a_run_without_settings_prints_its_choices_and_is_repeated_and_resumed_without_measuring(
    book: str, here: Path, measurements: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", book, "--minutes", "0.2"]) == 0
    output = capsys.readouterr().out
    assert output.count("chosen automatically") == 1
    table = output[: output.index("parameters, ")]
    settings = read_run_file(here / "runs/book/run.toml")
    for name in ("tokenizer", *SIZE_FIELDS, "batch_size", "steps", "learning_rate"):
        flag = f"--{name.replace('_', '-')}"
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [flag])
        assert line.split()[1] == str(settings[name])
    assert measurements[:2] == ["machine", "speed"]
    measurements.clear()
    fewer = ["--steps", "3", "--eval-every", "0", "--patience", "0"]
    assert main(["train", "--config", "runs/book/run.toml", "--out", "again", *fewer]) == 0
    assert main(["train", "--resume", "again"]) == 0
    assert "chosen automatically" not in capsys.readouterr().out
    assert measurements == []


def test_a_given_flag_replaces_a_choice(book: str, here: Path, measurements: list[str]) -> None:
    flags = ["--n-layer", "1", "--batch-size", "2", "--tokens", "600", "--tokenizer", "bpe:300", "--n-positions", "8"]
    assert main(["train", "--data", book, "--out", "run", "--learning-rate", "0.002", *flags]) == 0
    settings = read_run_file(here / "run/run.toml")
    expected = {"n_layer": 1, "batch_size": 2, "tokens": 600, "tokenizer": "bpe:300", "learning_rate": 0.002}
    assert expected.items() <= settings.items()
    assert "steps" not in settings
    assert "minutes" not in settings


def test_nothing_is_measured_if_only_the_learning_rate_is_open(
    here: Path, measurements: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = [*TINY, "--steps", "2"]
    assert main(["train", "--data", "text.txt", "--out", "run", *size]) == 0
    assert measurements == []
    assert "--learning-rate" in capsys.readouterr().out


def test_a_text_of_one_character_is_tokenized_as_bytes(here: Path, measurements: list[str]) -> None:
    (here / "a.txt").write_text("a" * 600_000)
    flags = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--steps", "1"]
    assert main(["train", "--data", "a.txt", "--out", "run", *flags]) == 0
    assert read_run_file(here / "run/run.toml")["tokenizer"] == "bytes"


def test_a_model_that_is_slower_than_estimated_is_chosen_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a twentieth of the estimated speed, a smaller model is measured and chosen."""
    measured = []

    def measure_slow(config: Any, *_: Any) -> float:
        measured.append(config)
        return 0.05 / seconds_per_token(config, MACBOOK, 4096)

    monkeypatch.setattr(plan_module, "measure_training_speed", measure_slow)
    sizes = {"train": TextSize(10**9, 1, 1).train, "val": 10**6}
    stream = {name: type("Stream", (), {"n_tokens": n}) for name, n in sizes.items()}
    tokenizer = type("Tokenizer", (), {"vocab_size": 1024})
    dataset = plan_module.Dataset("x", tokenizer, stream["train"], stream["val"], {}, 1.0, "")  # type: ignore[arg-type]
    choices: list[Choice] = plan_module.plan(dataset, MACBOOK, time.perf_counter() + 600, {})
    assert len(measured) == 2
    assert matrix_weights(measured[1]) < matrix_weights(measured[0])
    assert architecture(settings_of(choices), 1024) == measured[1]
