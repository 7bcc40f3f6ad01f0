"""A run that was killed, stopped or starved and resumed is, row by row and bit by bit, the run that never stopped."""

from __future__ import annotations

import json
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import environment, everything, in_a_process, the_line

from mlx_gpt.cli import main
from mlx_gpt.device import on_cpu
from mlx_gpt.store import folder
from mlx_gpt.store.checkpoint import CheckpointManager, list_checkpoints
from mlx_gpt.store.folder import load
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.windows import Windows
from mlx_gpt.train import clock as pace
from mlx_gpt.train import loop
from mlx_gpt.train import run as run_module
from mlx_gpt.train.step import make_eval_step
from mlx_gpt.train.validation import evaluate

SIZE = "--tokenizer bytes --n-positions 16 --n-embd 16 --n-layer 1 --n-head 2 --batch-size 2"
HOW = "--learning-rate 0.001 --eval-every 5 --checkpoint-every 4 --resid-pdrop 0.1"
RUN = shlex.split(f"train --data text.txt {SIZE} {HOW}")
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are half of the time of so short a run."""
    monkeypatch.setattr(run_module, "plot_loss", lambda *_: None)


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, less what is measured with a clock."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in read]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit on a CPU; a GPU adds the gradients of an embedding in any order."""
    if not on_cpu():
        for row, other_row in zip(rows(one), rows(other), strict=True):
            assert row == pytest.approx(other_row, rel=1e-3)
        return
    assert rows(one) == rows(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def interrupt_during(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Somebody presses Ctrl-C while this step is on its way."""
    done = pace.Clock.done

    def watched(clock: pace.Clock, n: int) -> float:
        if n == step and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)  # asked before each step: how far the run will be after it
        return done(clock, n)

    monkeypatch.setattr(pace.Clock, "done", watched)


# Ctrl-C


@pytest.mark.parametrize(
    "flags",
    [
        "--steps 24",
        "--steps 24 --optimizer muon --schedule wsd --accumulate 2",
        "--steps 24 --embd-pdrop 0.2 --attn-pdrop 0.2 --keep 1",
        "--tokens 700 --eval-every 0 --init model --n-positions 32 --n-layer 2",
        "--epochs 0.4 --eval-windows 0 --seed 18446744073709551615",
        "--steps 24 --checkpoint-every 0",
    ],
)
def test_a_run_that_is_stopped_and_resumed_again_and_again_equals_one_that_was_not(
    flags: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, *shlex.split(flags)]
    assert main([*arguments, "--out", "whole"]) == 0
    arguments += ["--out", "run"]
    for step in (1, 7, 10):  # 10 is also one of an evaluation
        with monkeypatch.context() as patch:
            interrupt_during(patch, step)
            assert main(arguments) == 130
        told = the_line(capsys.readouterr().err.lstrip("\n"))
        assert told == f"stopped after step {step}; go on with: mlx-gpt train --resume run"
        assert rows(here / "run")[-1]["step"] == step
        arguments = ["train", "--resume", "run"]
    assert main(arguments) == 0
    assert "going on after step 10\n" in capsys.readouterr().out
    assert_same_run(here / "run", here / "whole")


def test_a_second_ctrl_c_stops_at_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = []

    def look(*_: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        looked.append("after the first")
        signal.raise_signal(signal.SIGINT)
        looked.append("after the second")
        return 1.0

    monkeypatch.setattr(loop, "evaluate", look)
    assert main([*RUN, "--out", "run", "--steps", "24"]) == 130
    assert looked == ["after the first"]
    told = "stopped at once; go on from run/checkpoints/step-4, which is whole, with: mlx-gpt train --resume run"
    assert the_line(capsys.readouterr().err.lstrip("\n")) == told
    assert newest(here / "run") == "step-4"  # though it was at the evaluation of step 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# kill -9


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_gpt", *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_and_resumed_equals_one_that_was_not(here: Path) -> None:
    rng = random.Random(0)
    arguments = [*RUN, "--steps", "800", "--checkpoint-every", "20", "--eval-every", "50"]
    assert in_a_process(*arguments, "--out", "whole", cwd=here).returncode == 0  # as the other: to the bit
    arguments += ["--out", "run"]
    metrics, killed = here / "run/metrics.jsonl", []
    for _ in range(6):
        with started(*arguments, cwd=here) as process:
            before, more, patience = size_of(metrics), rng.randrange(100, 20_000), time.monotonic() + 60
            while abs(size_of(metrics) - before) < more and time.monotonic() < patience:
                time.sleep(0.001)
            process.kill()
        killed.append(process.returncode)
        arguments = ["train", "--resume", "run"]
    assert killed == [-signal.SIGKILL] * 6
    assert in_a_process(*arguments, cwd=here).returncode == 0
    assert_same_run(here / "run", here / "whole")


def test_ctrl_c_in_a_terminal_says_how_to_go_on(here: Path) -> None:
    with started(*RUN, "--out", "run", "--steps", "1000000", cwd=here) as process:
        patience = time.monotonic() + 60
        while not (here / "run/metrics.jsonl").exists() and time.monotonic() < patience:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    step = rows(here / "run")[-1]["step"]
    assert the_line(stderr.lstrip("\n")) == f"stopped after step {step}; go on with: mlx-gpt train --resume run"
    assert newest(here / "run") == f"step-{step}"


# The best model, and stopping early


def full_loss(folder: Path, text: Path) -> float:
    model, tokenizer = load(folder)
    dataset = load_dataset(str(text), tokenizer)
    windows = Windows.over(dataset.val, model.config.n_positions)
    return evaluate(model, make_eval_step(model), windows, 4)


OVERFIT = [*RUN, "--learning-rate", "0.03", "--eval-windows", "0", "--warmup", "0", "--schedule", "wsd"]


def noise(here: Path) -> None:
    """A text in which there is nothing to learn but how often each letter comes: more is learned by heart."""
    rng = random.Random(0)
    (here / "text.txt").write_text("".join(rng.choices("abcd ", (8, 4, 2, 1, 1), k=400)))


def test_the_best_model_is_what_is_left_and_patience_ends_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(here)
    assert main([*OVERFIT, "--steps", "400", "--patience", "3", "--out", "run"]) == 0
    looks = [(row["step"], row["val_loss"]) for row in rows(here / "run") if "val_loss" in row]
    best_step, best = min(looks, key=lambda look: look[1])
    on_the_way = looks[:-1]  # the last is that of the end, over all of the text
    assert [step for step, _ in on_the_way] == list(range(5, best_step + 5 * 3 + 1, 5))
    assert looks[-1][1] > best
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-6)
    said = capsys.readouterr().out
    assert f"the model is that of step {best_step}: validation {best:.4f}, and {looks[-1][1]:.4f} after the" in said
    assert f"validation loss {best:.4f} nats per token" in said


def test_the_last_model_is_what_is_left_where_it_is_the_best_or_nothing_was_measured(here: Path) -> None:
    for name, every in (("measured", "5"), ("unmeasured", "0")):
        assert main([*RUN, "--steps", "23", "--eval-every", every, "--out", name]) == 0
        last = rows(here / name)[-1]
        assert last["step"] == 23
        assert newest(here / name) == "step-23"  # if the last look is interrupted, no step is lost
        assert full_loss(here / name, here / "text.txt") == pytest.approx(last["val_loss"], rel=1e-6)


def test_the_best_model_can_be_used_while_the_run_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_during(patch, 7)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    best = next(row["val_loss"] for row in rows(here / "run") if "val_loss" in row)
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-6)
    assert main(["generate", "run", "--prompt", "a", "--max-tokens", "3"]) == 0


def test_patience_outlives_an_interruption(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(here)
    arguments = [*OVERFIT, "--steps", "400", "--patience", "3"]
    assert main([*arguments, "--out", "whole"]) == 0
    end = rows(here / "whole")[-1]["step"]
    assert end < 400
    with monkeypatch.context() as patch:
        interrupt_during(patch, end - 4)  # two of three are gone
        assert main([*arguments, "--out", "run"]) == 130
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(here / "run", here / "whole")


# Going on


@pytest.fixture
def stopped(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run that was stopped after step 10, and has the checkpoints of steps 8 and 10; beside it, one that was not."""
    assert main([*RUN, "--steps", "24", "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_during(patch, 10)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    capsys.readouterr()
    return here / "run"


def newest(run: Path) -> str:
    return list_checkpoints(run)[0].name


def test_from_a_damaged_checkpoint_the_one_before_it_is_taken_and_said(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "checkpoints/step-10/optimizer.safetensors").unlink()
    assert main(["train", "--resume", "run"]) == 0
    said = capsys.readouterr().out
    assert "run/checkpoints/step-10: expected optimizer.safetensors, which cannot be read (No such file" in said
    assert "; the one before it is used\ngoing on after step 8\n" in said
    assert_same_run(stopped, stopped.parent / "whole")


def test_a_run_that_is_done_is_only_measured_again(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = stopped.parent / "whole"
    before, done = everything(whole), rows(whole)
    assert main(["train", "--resume", "whole"]) == 0
    after = everything(whole)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"metrics.jsonl"}
    assert rows(whole) == done


def test_a_row_cut_short_and_rows_after_the_checkpoint_are_written_anew(stopped: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 9.9}\n{"step": 12, "lo')
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--learning-rate 0.5", "learning_rate = 0.5 (the run has 0.001)"),
        ("--steps 30 --n-layer 2", "n_layer = 2 (the run has 1); steps = 30 (the run has 24)"),
        ("--tokens 99", "steps = not set (the run has 24); tokens = 99 (the run has none)"),
        ("--data model", "data = "),
        ("--recompute", "recompute = True (the run has False)"),
    ],
)
def test_another_configuration_is_refused_and_the_differences_are_listed(
    stopped: Path, flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(stopped)
    assert main(["train", "--resume", "run", *shlex.split(flags)]) == 2
    assert told in the_line(capsys.readouterr().err)
    assert everything(stopped) == before


def test_another_text_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(stopped)
    text = stopped.parent / "text.txt"
    told = text.read_text()
    text.write_text(told.replace("line 7", "line 8"))
    assert main(["train", "--resume", "run"]) == 2
    assert the_line(capsys.readouterr().err).startswith("run: the text is not the one that the run began with; bring")
    assert everything(stopped) == before
    text.write_text(told)  # the same words, only written later
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


def test_the_same_configuration_may_be_said_again(stopped: Path) -> None:
    assert main(["train", "--resume", "run", "--steps", "24", "--n-layer", "1", "--data", "text.txt"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


def test_a_run_is_repeated_from_its_own_folder(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = stopped.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--config", "../whole/run.toml", "--out", "again"]) == 0
    assert_same_run(elsewhere / "again", stopped.parent / "whole")


def test_a_run_by_the_clock_goes_on_with_the_time_that_it_has_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()
    monkeypatch.setattr(pace.time, "perf_counter", lambda: float(next(seconds)))  # each look at the clock is a second
    arguments = [*RUN, "--steps", "1000000", "--minutes", "2", "--eval-every", "0"]
    assert main([*arguments, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_during(patch, 3)
        assert main([*arguments, "--out", "run"]) == 130
    assert main(["train", "--resume", "run"]) == 0
    whole, resumed = (rows(here / name)[-1]["step"] for name in ("whole", "run"))
    assert resumed == pytest.approx(whole, abs=2)


# No room


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Meanwhile no file can grow beyond so many bytes. (Python ignores the signal that comes with it.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TOO_LARGE = "run: cannot be written (File too large); make room, then go on from run/checkpoints/step-10, which is"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "the first rows",
            TOO_LARGE,
        ),
        ("a row", TOO_LARGE),
        ("a checkpoint", "run/checkpoints/step-12 could not be saved ("),
    ],
)
def test_a_full_disk_is_told_and_the_checkpoint_before_it_is_as_it_was(
    what: str, told: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (stopped / "metrics.jsonl").stat().st_size
    room = {"the first rows": size - 1, "a row": size + 99, "a checkpoint": 20_000}[what]
    before = everything(stopped)
    with limited(room):
        assert main(["train", "--resume", "run"]) == 1
    line = the_line(capsys.readouterr().err)
    assert told in line
    assert line.endswith("with: mlx-gpt train --resume run")
    after = everything(stopped)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"metrics.jsonl"}
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


def test_a_model_that_cannot_be_exported_leaves_the_best_before_it(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(stopped)

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_safetensors", no_room)
        patch.setattr(CheckpointManager, "save", lambda *_: None)
        assert main(["train", "--resume", "run"]) == 1
    line = the_line(capsys.readouterr().err)
    assert line.startswith("run: the model could not be saved ([Errno 28] No space left on device); make room or ")
    assert line.endswith("then resume with: mlx-gpt train --resume run")
    after = everything(stopped)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"metrics.jsonl"}
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")
