"""What nobody gave is picked: the same picks for the same text, machine and time, possible for any of them, given
settings untouched; and a run with nothing else keeps to its time."""

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
from mlx_gpt.train.auto.defaults import EPOCHS, TUNING_EPOCHS, pick
from mlx_gpt.train.auto.model_size import (
    SIZE,
    WEIGHTS_PER_TOKEN,
    Measured,
    Pick,
    Text,
    architecture,
    pick_tokenizer,
)
from mlx_gpt.train.auto.plan import flags_of
from mlx_gpt.train.config import COUNTED, TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token
from mlx_gpt.train.memory import step_memory

LAPTOP = Machine(matrix_speed=4e9, element_speed=6e7, memory=8 << 30)  # a CPU with MLX's plain wheel
MACBOOK = Machine(matrix_speed=2e12, element_speed=5e9, memory=12 << 30)
STUDIO = Machine(matrix_speed=2e13, element_speed=5e10, memory=96 << 30)
BOOK = Text(train=400_000, val=45_000, vocab_size=1024)


def picked(text: Text = BOOK, machine: Machine = MACBOOK, minutes: float = 10, **given: Any) -> dict[str, Any]:
    """All settings of a run: what is given, and what is picked beside it."""
    flags = flags_of(pick(text, machine, 60 * minutes, given))
    assert not flags.keys() & given.keys()
    return {**flags, **given}


def training(settings: dict[str, Any]) -> TrainConfig:
    return plan_module.training_of(settings)


def tokens(settings: dict[str, Any]) -> int:
    return settings["steps"] * settings["batch_size"] * settings["accumulate"] * settings["n_positions"]


# Whatever there is


@pytest.mark.parametrize("machine", [LAPTOP, MACBOOK, STUDIO])
@pytest.mark.parametrize("n_tokens", [20, 1000, 40_000, 10**6, 10**8, 10**10])
def test_for_every_text_machine_and_time_the_picks_are_possible(n_tokens: int, machine: Machine) -> None:
    for minutes, vocab_size in product((0.2, 2, 10, 600), (257, 8192, 50257)):
        text = Text(n_tokens, max(1, n_tokens // 9), vocab_size)
        settings = picked(text, machine, minutes)
        config, how = architecture(settings, vocab_size), training(settings)  # which refuse what cannot be
        assert config.n_positions <= n_tokens
        assert step_memory(config, how) <= machine.memory
        assert tokens(settings) <= 1.5 * EPOCHS * n_tokens + how.batch_size * config.n_positions
        assert how.minutes is not None
        assert how.minutes <= max(1.2 * minutes, 0.4)
        assert 1e-4 < how.learning_rate <= 1e-2
        assert how.eval_every * 2 <= how.steps or how.steps < 8


def test_the_same_input_gives_the_same_picks_each_with_its_reason() -> None:
    first, second = (pick(BOOK, MACBOOK, 600, {}) for _ in range(2))
    assert first == second
    assert all(one.why for one in first)
    assert {*SIZE, "batch_size", "steps", "learning_rate"} <= flags_of(first).keys()


def test_a_faster_machine_and_more_time_take_larger_models_and_see_more() -> None:
    much = Text(10**9, 10**8, 4096)
    runs = [picked(much, machine, minutes) for machine in (LAPTOP, MACBOOK, STUDIO) for minutes in (2, 10, 60)]
    for slower, faster in ((0, 1), (1, 2), (0, 3), (3, 4), (4, 5), (3, 6), (6, 7), (7, 8)):
        assert tokens(runs[slower]) < tokens(runs[faster])
        weights = [matrix_weights(architecture(runs[i], 4096)) for i in (slower, faster)]
        assert weights[0] <= weights[1]
    assert matrix_weights(architecture(runs[0], 4096)) * 50 < matrix_weights(architecture(runs[8], 4096))


@pytest.mark.parametrize("machine", [LAPTOP, MACBOOK, STUDIO])
def test_enough_text_gives_every_weight_about_twenty_tokens(machine: Machine) -> None:
    settings = picked(Text(10**9, 10**8, 1024), machine, 30)
    assert 6 < tokens(settings) / matrix_weights(architecture(settings, 1024)) < 60


def test_a_small_text_takes_a_small_model_dropout_and_an_early_end() -> None:
    small, large = picked(Text(50_000, 5_000, 257), STUDIO), picked(Text(10**9, 10**8, 257), STUDIO)
    weights = [matrix_weights(architecture(settings, 257)) for settings in (small, large)]
    assert weights[0] <= WEIGHTS_PER_TOKEN * 50_000 < weights[1]
    assert small["resid_pdrop"] == small["embd_pdrop"] == 0.2
    assert small["patience"] > 0
    assert not {"resid_pdrop", "patience"} & large.keys()


def test_the_time_is_that_of_everything() -> None:
    """Of ten minutes evaluations have their share: what is left for steps, at the measured speed, is what they take."""
    config = architecture(picked(), BOOK.vocab_size)
    for speed in (2_000.0, 50_000.0):
        settings = flags_of(pick(BOOK, MACBOOK, 600, {}, measured=Measured(config, speed)))
        training_takes = tokens(settings) / speed
        n_looks = settings["steps"] // settings["eval_every"]
        looks = n_looks * settings["eval_windows"] + settings.get("final_windows", BOOK.val / config.n_positions)
        takes = training_takes + looks * config.n_positions / (2 * speed)
        assert takes < 600
        assert takes > 540 or tokens(settings) > (EPOCHS - 1) * BOOK.train


def test_all_of_a_large_validation_text_is_not_looked_at() -> None:
    settings = picked(Text(10**9, 10**8, 1024), LAPTOP)
    assert 0 < settings["final_windows"] * settings["n_positions"] < 10**6
    assert "final_windows" not in picked(machine=STUDIO)


# What is given


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
def test_what_is_given_stays_and_the_rest_suits_it(given: dict[str, Any]) -> None:
    settings = picked(**given)
    assert {name: settings[name] for name in given} == given
    architecture(settings, BOOK.vocab_size)
    training(settings)
    assert len(settings.keys() & {*COUNTED}) == 1


def test_a_length_that_is_given_leaves_evaluations_alone_and_a_model_its_dropout() -> None:
    assert not {"eval_every", "patience", "minutes"} & picked(steps=100).keys()
    size = {name: getattr(SMALL, name) for name in SIZE}
    assert "resid_pdrop" not in picked(Text(1000, 100, 257), STUDIO, **size)


def test_several_processes_share_a_step_and_have_no_clock() -> None:
    alone = flags_of(pick(BOOK, MACBOOK, 600, {}))
    together = flags_of(pick(BOOK, MACBOOK, 600, {}, processes=4))
    assert "minutes" in alone
    assert "minutes" not in together
    assert together["batch_size"] < alone["batch_size"] * 2


def test_a_trained_model_is_tuned_gently_and_briefly() -> None:
    size = {name: getattr(SMALL, name) for name in SIZE}
    scratch, tuned = (flags_of(pick(BOOK, STUDIO, 600, size, tuning=tuning)) for tuning in (False, True))
    assert tuned["learning_rate"] < scratch["learning_rate"] / 4
    assert tokens({**tuned, **size}) <= (TUNING_EPOCHS + 1) * BOOK.train
    assert "optimizer" not in tuned


# The tokenizer


def test_the_more_text_the_more_ids_but_no_head_larger_than_the_model() -> None:
    def ids(n_bytes: int, machine: Machine, minutes: float = 10) -> int:
        spec = pick_tokenizer(n_bytes, machine, 60 * minutes).settings["tokenizer"]
        return 257 if spec == "bytes" else int(spec.removeprefix("bpe:"))

    assert [ids(n, STUDIO) for n in (0, 10_000, 500_000, 600_000, 1_100_000, 10**7, 10**9)] == sorted(
        ids(n, STUDIO) for n in (0, 10_000, 500_000, 600_000, 1_100_000, 10**7, 10**9)
    )
    assert ids(100_000, STUDIO) == 257
    assert ids(1_100_000, STUDIO) == 1024
    assert ids(10**9, LAPTOP, 2) <= 1024 < ids(10**9, STUDIO)


# A run with nothing else


@pytest.fixture
def slow_to_measure(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured: a list to look at."""
    found: list[str] = []

    def measure() -> Machine:
        found.append("machine")
        return Machine(4e9, 6e7, 8 << 30)

    speed = plan_module.measure_training_speed
    monkeypatch.setattr(plan_module, "measure", measure)
    monkeypatch.setattr(
        plan_module, "measure_training_speed", lambda *arguments: (found.append("speed"), speed(*arguments))[1]
    )
    return found


@pytest.fixture
def book(here: Path) -> str:
    (here / "book.txt").write_text("\n".join(tinyworld.generate_stories(60, seed=1)))
    return "book.txt"


def test_a_run_with_nothing_else_says_what_it_picked_and_is_repeated_and_resumed_without_measuring(
    book: str, here: Path, slow_to_measure: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", book, "--minutes", "0.2"]) == 0
    said = capsys.readouterr().out
    assert said.count("picked, since it was not given") == 1
    table = said[: said.index("parameters, ")]
    settings = read_run_file(here / "runs/book/run.toml")
    for name in ("tokenizer", *SIZE, "batch_size", "steps", "learning_rate"):
        flag = f"--{name.replace('_', '-')}"
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [flag])
        assert line.split()[1] == str(settings[name])
    assert slow_to_measure[:2] == ["machine", "speed"]
    slow_to_measure.clear()
    fewer = ["--steps", "3", "--eval-every", "0", "--patience", "0"]
    assert main(["train", "--config", "runs/book/run.toml", "--out", "again", *fewer]) == 0
    assert main(["train", "--resume", "again"]) == 0
    assert "picked" not in capsys.readouterr().out
    assert slow_to_measure == []


def test_a_flag_beside_it_wins(book: str, here: Path, slow_to_measure: list[str]) -> None:
    flags = ["--n-layer", "1", "--batch-size", "2", "--tokens", "600", "--tokenizer", "bpe:300", "--n-positions", "8"]
    assert main(["train", "--data", book, "--out", "run", "--learning-rate", "0.002", *flags]) == 0
    settings = read_run_file(here / "run/run.toml")
    expected = {"n_layer": 1, "batch_size": 2, "tokens": 600, "tokenizer": "bpe:300", "learning_rate": 0.002}
    assert expected.items() <= settings.items()
    assert "steps" not in settings
    assert "minutes" not in settings


def test_where_all_is_given_but_the_rate_nothing_is_measured(
    here: Path, slow_to_measure: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = [*TINY, "--steps", "2"]
    assert main(["train", "--data", "text.txt", "--out", "run", *size]) == 0
    assert slow_to_measure == []
    assert "--learning-rate" in capsys.readouterr().out


def test_a_text_of_one_character_gets_bytes(here: Path, slow_to_measure: list[str]) -> None:
    (here / "a.txt").write_text("a" * 600_000)
    flags = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--steps", "1"]
    assert main(["train", "--data", "a.txt", "--out", "run", *flags]) == 0
    assert read_run_file(here / "run/run.toml")["tokenizer"] == "bytes"


def test_a_model_whose_speed_surprises_is_chosen_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times slower than products alone had it look: a smaller one is tried, and taken at its own speed."""
    tried = []

    def slow(config: Any, *_: Any) -> float:
        tried.append(config)
        return 0.05 / seconds_per_token(config, MACBOOK, 4096)

    monkeypatch.setattr(plan_module, "measure_training_speed", slow)
    sizes = {"train": Text(10**9, 1, 1).train, "val": 10**6}
    stream = {name: type("Stream", (), {"n_tokens": n}) for name, n in sizes.items()}
    tokenizer = type("Tokenizer", (), {"vocab_size": 1024})
    dataset = plan_module.Dataset("x", tokenizer, stream["train"], stream["val"], {}, 1.0, "")  # type: ignore[arg-type]
    picks: list[Pick] = plan_module.plan(dataset, MACBOOK, time.perf_counter() + 600, {})
    assert len(tried) == 2
    assert matrix_weights(tried[1]) < matrix_weights(tried[0])
    assert architecture(flags_of(picks), 1024) == tried[1]
