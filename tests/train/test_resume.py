"""A run that was killed or stopped and resumed equals, row by row and bit by bit, an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import shutil
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
from mlx_gpt.commands import train as train_module
from mlx_gpt.device import on_cpu
from mlx_gpt.store import checkpoint as checkpoint_module
from mlx_gpt.store import folder
from mlx_gpt.store.checkpoint import CheckpointManager, list_checkpoints
from mlx_gpt.store.folder import load
from mlx_gpt.store.run_file import read_run_file
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.windows import Windows
from mlx_gpt.train import clock as clock_module
from mlx_gpt.train import loop
from mlx_gpt.train import run as run_module
from mlx_gpt.train.auto import plan as plan_module
from mlx_gpt.train.config import LIMITS
from mlx_gpt.train.schedule import cosine
from mlx_gpt.train.step import make_eval_step
from mlx_gpt.train.validation import evaluate

SIZE = "--tokenizer bytes --n-positions 16 --n-embd 16 --n-layer 1 --n-head 2 --batch-size 2"
HOW = "--learning-rate 0.001 --eval-every 5 --checkpoint-every 4 --resid-pdrop 0.1"
RUN = shlex.split(f"train --data text.txt {SIZE} {HOW}")
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take half the time of so short a run."""
    monkeypatch.setattr(run_module, "plot_loss", lambda *_: None)


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times and memory."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in read]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit on a CPU; a GPU adds the gradients of an embedding in a varying order."""
    if not on_cpu():
        for row, other_row in zip(rows(one), rows(other), strict=True):
            assert row == pytest.approx(other_row, rel=1e-3)
        return
    assert rows(one) == rows(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def interrupt_during(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    """Send signals, or press Ctrl-C, during a step."""
    done = clock_module.Clock.done
    left = [*(signals or (signal.SIGINT,))]

    def watched(clock: clock_module.Clock, n: int) -> float:  # called before each step
        while n == step and left and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.raise_signal(left.pop())
        return done(clock, n)

    monkeypatch.setattr(clock_module.Clock, "done", watched)


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
def test_a_run_that_is_stopped_and_resumed_repeatedly_equals_an_uninterrupted_run(
    flags: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, *shlex.split(flags)]
    assert main([*arguments, "--out", "whole"]) == 0
    arguments += ["--out", "run"]
    for step in (1, 7, 10):  # step 10 has an evaluation too
        with monkeypatch.context() as patch:
            interrupt_during(patch, step)
            assert main(arguments) == 130
        message = the_line(capsys.readouterr().err.lstrip("\n"))
        assert message == f"stopped after step {step}; resume with: mlx-gpt train --resume run"
        assert rows(here / "run")[-1]["step"] == step
        arguments = ["train", "--resume", "run"]
    assert main(arguments) == 0
    assert "resuming after step 10\n" in capsys.readouterr().out
    assert_same_run(here / "run", here / "whole")


def test_a_second_ctrl_c_stops_at_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = []

    def evaluate_interrupted(*_: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        evaluated.append("after the first")
        signal.raise_signal(signal.SIGINT)
        evaluated.append("after the second")
        return 1.0

    monkeypatch.setattr(loop, "evaluate", evaluate_interrupted)
    assert main([*RUN, "--out", "run", "--steps", "24"]) == 130
    assert evaluated == ["after the first"]
    message = "stopped at once; resume from run/checkpoints/step-4 with: mlx-gpt train --resume run"
    assert the_line(capsys.readouterr().err.lstrip("\n")) == message
    assert newest(here / "run") == "step-4"  # not 5, whose evaluation was interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_end_a_run_as_ctrl_c_does(
    signum: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, "--steps", "24", "--out", "run"]
    with monkeypatch.context() as patch:
        interrupt_during(patch, 6, signum, *([signum] * (signum == signal.SIGHUP)))  # a terminal sends several
        assert main(arguments) == 128 + signum
    message = the_line(capsys.readouterr().err)
    assert message == "stopped after step 6; resume with: mlx-gpt train --resume run"
    assert signal.getsignal(signum) is signal.SIG_DFL
    assert main(["train", "--resume", "run"]) == 0
    assert main([*RUN, "--steps", "24", "--out", "whole"]) == 0
    assert_same_run(here / "run", here / "whole")


@pytest.mark.parametrize("phase", ["read", "measure", "step", "save", "evaluate", "sample", "finish", "plot"])
def test_sigterm_ends_a_run_in_every_phase_with_a_folder_that_resumes_or_none(
    phase: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name, call = {
        "read": (train_module, "load_dataset", 1),
        "measure": (plan_module, "measure_training_speed", 1),
        "step": (loop, "make_train_step", 1),
        "save": (CheckpointManager, "save", 3),
        "evaluate": (loop, "evaluate", 2),
        "sample": (train_module, "generate", 2),
        "finish": (loop, "evaluate", 3),
        "plot": (run_module, "plot_loss", 1),
    }[phase]
    arguments = ["train", "--data", "text.txt", *shlex.split(SIZE), *shlex.split(HOW), "--steps", "12"]
    if phase == "measure":
        arguments = ["train", "--data", "text.txt", "--minutes", "0.05"]
    original, calls = getattr(module, name), count(1)

    def interrupted(*rest: Any, **options: Any) -> Any:
        result = original(*rest, **options)
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert main([*arguments, "--out", "run"]) == 128 + signal.SIGTERM
    message = the_line(capsys.readouterr().err)
    if phase in ("read", "measure", "step"):
        assert message == "stopped"
        assert not (here / "run").exists()
        return
    assert message.endswith("mlx-gpt train --resume run")
    assert main(["train", "--resume", "run"]) == 0
    assert main([*arguments, "--out", "whole"]) == 0
    assert_same_run(here / "run", here / "whole")


def test_a_second_signal_during_a_save_leaves_the_earlier_checkpoints(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = folder.save
    calls = count(1)

    def interrupted(*rest: Any) -> None:
        save(*rest)
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save", interrupted)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 128 + signal.SIGTERM
    message = "stopped at once; resume from run/checkpoints/step-4 with: mlx-gpt train --resume run"
    assert the_line(capsys.readouterr().err) == message
    assert not list((here / "run").rglob(".*"))
    assert main(["train", "--resume", "run"]) == 0


def test_a_signal_that_is_ignored_stays_ignored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        interrupt_during(monkeypatch, 6, signal.SIGHUP)
        assert main([*RUN, "--steps", "12", "--out", "run"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_terminal_is_closed_ends_with_a_checkpoint(here: Path) -> None:
    terminal, side = os.openpty()
    command = [sys.executable, "-m", "mlx_gpt", *RUN, "--steps", "1000000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
         "os.execv(sys.argv[1], sys.argv[1:])", *command],
        cwd=here, env=environment(), stdin=side, stdout=side, stderr=side, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    patience = time.monotonic() + 60
    while size_of(here / "run/metrics.jsonl") < 2000 and time.monotonic() < patience:
        time.sleep(0.02)
        os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert newest(here / "run") == f"step-{rows(here / 'run')[-1]['step']}"


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
def test_a_run_that_is_killed_at_random_moments_and_resumed_equals_an_uninterrupted_run(here: Path) -> None:
    rng = random.Random(0)
    arguments = [*RUN, "--steps", "500", "--checkpoint-every", "20", "--eval-every", "50"]
    assert in_a_process(*arguments, "--out", "whole", cwd=here).returncode == 0
    arguments += ["--out", "run"]
    metrics, killed = here / "run/metrics.jsonl", []
    for _ in range(4):
        with started(*arguments, cwd=here) as process:
            before, more, patience = size_of(metrics), rng.randrange(100, 15_000), time.monotonic() + 60
            while abs(size_of(metrics) - before) < more and time.monotonic() < patience:
                time.sleep(0.001)
            process.kill()
        killed.append(process.returncode)
        arguments = ["train", "--resume", "run"]
    assert killed == [-signal.SIGKILL] * 4
    assert in_a_process(*arguments, cwd=here).returncode == 0
    assert_same_run(here / "run", here / "whole")


def test_ctrl_c_in_a_terminal_prints_how_to_resume(here: Path) -> None:
    with started(*RUN, "--out", "run", "--steps", "1000000", cwd=here) as process:
        patience = time.monotonic() + 60
        while not (here / "run/metrics.jsonl").exists() and time.monotonic() < patience:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    step = rows(here / "run")[-1]["step"]
    assert the_line(stderr.lstrip("\n")) == f"stopped after step {step}; resume with: mlx-gpt train --resume run"
    assert newest(here / "run") == f"step-{step}"


# The best model, and stopping early


def full_loss(folder: Path, text: Path) -> float:
    model, tokenizer = load(folder)
    dataset = load_dataset(str(text), tokenizer)
    windows = Windows.over(dataset.val, model.config.n_positions)
    return evaluate(model, make_eval_step(model), windows, 4)


OVERFIT = [*RUN, "--learning-rate", "0.03", "--eval-windows", "0", "--warmup", "0", "--schedule", "wsd"]


def noise(here: Path) -> None:
    """Write a text with nothing to learn but the frequency of letters, so that further training overfits."""
    rng = random.Random(0)
    (here / "text.txt").write_text("".join(rng.choices("abcd ", (8, 4, 2, 1, 1), k=400)))


def test_patience_ends_the_run_with_the_best_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(here)
    assert main([*OVERFIT, "--steps", "400", "--patience", "3", "--out", "run"]) == 0
    evaluations = [(row["step"], row["val_loss"]) for row in rows(here / "run") if "val_loss" in row]
    best_step, best = min(evaluations, key=lambda one: one[1])
    during_training = evaluations[:-1]  # the last one is over all of the text
    assert [step for step, _ in during_training] == list(range(5, best_step + 5 * 3 + 1, 5))
    assert evaluations[-1][1] > best
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-6)
    output = capsys.readouterr().out
    assert (
        f"the model is that of step {best_step}: validation {best:.4f}, and {evaluations[-1][1]:.4f} after the"
        in output
    )
    assert f"validation loss {best:.4f} nats per token" in output


def test_a_run_ends_with_the_last_model_if_it_is_the_best_or_nothing_was_evaluated(here: Path) -> None:
    for name, every in (("measured", "5"), ("unmeasured", "0")):
        assert main([*RUN, "--steps", "23", "--eval-every", every, "--out", name]) == 0
        last = rows(here / name)[-1]
        assert last["step"] == 23
        assert newest(here / name) == "step-23"  # so that an interrupted last evaluation loses no step
        assert full_loss(here / name, here / "text.txt") == pytest.approx(last["val_loss"], rel=1e-6)


def test_the_best_model_can_be_used_during_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_during(patch, 7)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    best = next(row["val_loss"] for row in rows(here / "run") if "val_loss" in row)
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-6)
    assert main(["generate", "run", "--prompt", "a", "--max-tokens", "3"]) == 0


def test_patience_continues_after_a_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(here)
    arguments = [*OVERFIT, "--steps", "400", "--patience", "3"]
    assert main([*arguments, "--out", "whole"]) == 0
    end = rows(here / "whole")[-1]["step"]
    assert end < 400
    with monkeypatch.context() as patch:
        interrupt_during(patch, end - 4)  # after two of three
        assert main([*arguments, "--out", "run"]) == 130
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(here / "run", here / "whole")


# Resuming


@pytest.fixture
def stopped(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run stopped after step 10, with checkpoints of steps 8 and 10; and ``whole``, an uninterrupted one."""
    assert main([*RUN, "--steps", "24", "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_during(patch, 10)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    capsys.readouterr()
    return here / "run"


def newest(run: Path) -> str:
    return list_checkpoints(run)[0].name


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


# A full disk


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit the size of files, in bytes. (Python ignores SIGXFSZ.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TOO_LARGE = "run: cannot be written (File too large); make room, then resume from run/checkpoints/step-10 with: "


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("the first rows", TOO_LARGE),
        ("a row", TOO_LARGE),
        ("a checkpoint", "run/checkpoints/step-12 could not be saved ("),
    ],
)
def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_unchanged(
    what: str, message: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (stopped / "metrics.jsonl").stat().st_size
    room = {"the first rows": size - 1, "a row": size + 99, "a checkpoint": 20_000}[what]
    before = everything(stopped)
    with limited(room):
        assert main(["train", "--resume", "run"]) == 1
    line = the_line(capsys.readouterr().err)
    assert message in line
    assert line.endswith("with: mlx-gpt train --resume run")
    after = everything(stopped)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"metrics.jsonl"}
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(stopped, stopped.parent / "whole")


@pytest.mark.parametrize("what", ["settings", "checkpoint"])
def test_a_full_disk_before_the_first_checkpoint_has_a_remedy_that_works(
    what: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"settings": (run_module, "write_run_file"), "checkpoint": (checkpoint_module, "_write")}[what], no_room
        )
        assert main([*RUN, "--steps", "2", "--out", "run"]) == 1
    line = the_line(capsys.readouterr().err)
    if what == "settings":
        assert line == "run: cannot be written (No space left on device); make room, then start again"
        assert not Path("run").exists()
        return
    assert "; it would have been the first: make room, then start again in a new folder: mlx-gpt " in line
    command = shlex.split(line.partition("folder: mlx-gpt ")[2])
    assert main(command) == 0


def test_a_model_that_cannot_be_exported_leaves_the_previous_best_one(
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
