"""A run that was stopped or killed and then resumed equals, row by row and bit by bit, an uninterrupted run."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import environment, the_line
from helpers.runs import HOW, RUN, SIZE, assert_same_run, interrupt_during, newest, rows, size_of

from mlx_gpt.cli import main
from mlx_gpt.commands import train as train_module
from mlx_gpt.store import checkpoint as checkpoint_module
from mlx_gpt.store import folder
from mlx_gpt.store.checkpoint import CheckpointManager
from mlx_gpt.train import loop
from mlx_gpt.train import run as run_module
from mlx_gpt.train.auto import plan as plan_module

pytestmark = pytest.mark.usefixtures("no_plots")


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


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_gpt", *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_and_resumed_equals_an_uninterrupted_run(here: Path) -> None:
    rng = random.Random(0)
    arguments = [*RUN, "--steps", "200", "--checkpoint-every", "10", "--eval-every", "25"]
    assert main([*arguments, "--out", "whole"]) == 0
    arguments += ["--out", "run"]
    metrics, killed = here / "run/metrics.jsonl", []
    for _ in range(4):
        with started(*arguments, cwd=here) as process:
            before, more, patience = size_of(metrics), rng.randrange(100, 6_000), time.monotonic() + 60
            while abs(size_of(metrics) - before) < more and time.monotonic() < patience:
                time.sleep(0.001)
            process.kill()
        killed.append(process.returncode)
        arguments = ["train", "--resume", "run"]
    assert killed == [-signal.SIGKILL] * 4
    assert main(arguments) == 0
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
