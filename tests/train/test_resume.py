"""A run is resumed with its own settings and text, extended with its optimizer, and repeated from its folder."""

from __future__ import annotations

import shlex
import shutil
from itertools import count
from pathlib import Path

import pytest
from helpers.command_line import everything, the_line
from helpers.runs import OVERFIT, RUN, assert_same_run, interrupt_during, noise, rows

from mlx_gpt.cli import main
from mlx_gpt.store.checkpoint import list_checkpoints
from mlx_gpt.store.run_file import read_run_file
from mlx_gpt.train import clock as clock_module
from mlx_gpt.train.config import LIMITS
from mlx_gpt.train.schedule import cosine

pytestmark = pytest.mark.usefixtures("no_plots")


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "checkpoints/step-10/optimizer.safetensors").unlink()
    assert main(["train", "--resume", "run"]) == 0
    output = capsys.readouterr().out
    assert "run/checkpoints/step-10: expected optimizer.safetensors, which cannot be read (No such file" in output
    assert "; the one before it is used\nresuming after step 8\n" in output
    assert_same_run(stopped, stopped.parent / "whole")


def test_resuming_a_completed_run_only_evaluates_it_again(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = stopped.parent / "whole"
    before, done = everything(whole), rows(whole)
    assert main(["train", "--resume", "whole"]) == 0
    assert "\nthe run is finished at step 24: nothing is trained; --steps M, a " in capsys.readouterr().out
    after = everything(whole)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"metrics.jsonl"}
    assert rows(whole) == done


def test_rows_after_the_checkpoint_and_a_partial_row_are_rewritten(stopped: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 9.9}\n{"step": 12, "lo')
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning-rate 0.5", "learning_rate = 0.5 (the run has 0.001)"),
        ("--steps 30 --n-layer 2", "n_layer = 2 (the run has 1); remove"),
        ("--preset gpt2", "in its own folder, with its own settings: remove --preset"),
        ("--prompt the", "prompt = the (the run has "),
        ("--tokens 99", "--tokens 99 has passed: the run has had 10 steps, 320 tokens, "),
        ("--steps 10", "--steps 10 has passed: the run has had 10 steps"),
        ("--epochs 0.01", "--epochs 0.01 has passed: the run has had 10 steps"),
        ("--minutes 1e-9", "--minutes 1e-09 has passed: the run has had 10 steps"),
        ("--data model", "data = "),
        ("--recompute", "recompute = True (the run has False)"),
    ],
)
def test_another_configuration_is_refused_and_the_differences_are_listed(
    stopped: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(stopped)
    assert main(["train", "--resume", "run", *shlex.split(flags)]) == 2
    assert message in the_line(capsys.readouterr().err)
    assert everything(stopped) == before


def test_another_text_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(stopped)
    text = stopped.parent / "text.txt"
    message = text.read_text()
    text.write_text(message.replace("line 7", "line 8"))
    assert main(["train", "--resume", "run"]) == 2
    assert the_line(capsys.readouterr().err).startswith("run: the text differs from that of the run to resume; restore")
    assert everything(stopped) == before
    text.write_text(message)  # the same text with a later modification time
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


def test_flags_that_equal_the_settings_of_the_run_are_accepted(stopped: Path) -> None:
    assert main(["train", "--resume", "run", "--steps", "24", "--n-layer", "1", "--data", "text.txt"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


# Another length


def learning_rates(run: Path) -> list[float]:
    return [row["learning_rate"] for row in rows(run) if "learning_rate" in row]


@pytest.mark.parametrize("flags", ["--steps 48", f"--tokens {48 * 32}", "--minutes 1000"])
def test_a_completed_run_is_extended_with_its_optimizer_and_its_learning_rate_rises_again(
    flags: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "minutes" in flags:
        monkeypatch.setattr(clock_module.Clock, "done", lambda clock, n: n / (48 if clock.minutes else 24))
    whole = [*RUN, "--steps", "24", "--warmup", "0.25", "--out", "whole"]
    assert main(whole) == 0
    before = rows(here / "whole")[:-1]  # the last is the validation loss at the end
    state = (here / "whole/checkpoints/step-24/optimizer.safetensors").read_bytes()
    assert main(["train", "--resume", "whole", *shlex.split(flags)]) == 0
    assert f"the length of the run is {flags} in all, no longer --steps 24\n" in capsys.readouterr().out
    assert rows(here / "whole")[: len(before)] == before
    assert [row["step"] for row in rows(here / "whole") if "loss" in row] == [*range(1, 49)]
    assert (here / "whole/checkpoints/step-48/optimizer.safetensors").read_bytes() != state
    settings = read_run_file(here / "whole/run.toml")
    assert {f"--{name} {settings[name]}" for name in LIMITS if name in settings} <= {flags, f"{flags}.0"}
    rates = learning_rates(here / "whole")[23:]
    assert rates[0] == pytest.approx(1e-4)  # a tenth of the peak
    rise = [1e-4 + 9e-4 * (n - 24) / 6 for n in range(24, 49)]  # over a quarter of the 24 steps
    planned = [1e-4 + 9e-4 * cosine(n / 48, 0.25) for n in range(24, 49)]
    assert rates == pytest.approx([min(pair) for pair in zip(rise, planned, strict=True)])
    assert max(rates) > 4e-4


def test_an_extension_that_is_stopped_or_killed_at_once_equals_an_uninterrupted_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*RUN, "--steps", "12", "--out", "run"]) == 0
    shutil.copytree("run", "whole")
    for steps, stops in (("24", (13, 14, 20)), ("36", (25,))):  # twice
        assert main(["train", "--resume", "whole", "--steps", steps]) == 0
        arguments = ["train", "--resume", "run", "--steps", steps]
        for step in stops:
            with monkeypatch.context() as patch:
                interrupt_during(patch, step)
                assert main(arguments) == 130
            arguments = ["train", "--resume", "run"]
            if step == stops[0]:  # as if killed before the first checkpoint of the extension
                shutil.rmtree(list_checkpoints(here / "run")[0])
        assert main(arguments) == 0
        assert_same_run(here / "run", here / "whole")


def test_an_interrupted_run_that_is_extended_equals_an_uninterrupted_one_of_that_length_where_the_schedules_agree(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*RUN, "--schedule", "wsd", "--warmup", "0"]
    assert main([*arguments, "--steps", "48", "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_during(patch, 10)
        assert main([*arguments, "--steps", "24", "--out", "run"]) == 130
    assert main(["train", "--resume", "run", "--steps", "48"]) == 0
    assert_same_run(here / "run", here / "whole")


def test_a_run_that_patience_ended_can_be_extended(here: Path) -> None:
    noise(here)
    assert main([*OVERFIT, "--steps", "100", "--patience", "3", "--out", "run"]) == 0
    end = rows(here / "run")[-1]["step"]
    assert end < 100
    assert main(["train", "--resume", "run", "--steps", "101"]) == 0
    assert end < rows(here / "run")[-1]["step"] <= 101


# Repeating


def test_a_run_is_repeated_from_its_own_folder(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = stopped.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--config", "../whole/run.toml", "--out", "again"]) == 0
    assert_same_run(elsewhere / "again", stopped.parent / "whole")


def test_a_resumed_run_with_a_time_limit_has_the_time_that_is_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(next(seconds)))  # a second per call
    arguments = [*RUN, "--steps", "1000000", "--minutes", "2", "--eval-every", "0"]
    assert main([*arguments, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_during(patch, 3)
        assert main([*arguments, "--out", "run"]) == 130
    assert main(["train", "--resume", "run"]) == 0
    whole, resumed = (rows(here / name)[-1]["step"] for name in ("whole", "run"))
    assert resumed == pytest.approx(whole, abs=2)
