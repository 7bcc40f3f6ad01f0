"""Two processes that train together are one with the same batch, and one of them writes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import TINY, environment, everything, the_line

from mlx_gpt.cli import main
from mlx_gpt.store.checkpoint import list_checkpoints
from mlx_gpt.store.run_file import read_run_file
from mlx_gpt.train.distributed import RANK_VARIABLES, join

RUN = ["train", "--data", "text.txt", *TINY, "--eval-every", "5", "--checkpoint-every", "4"]


def two(*arguments: str, here: Path) -> list[subprocess.Popen[str]]:
    """The same command line as two processes of MLX's ring, on this machine."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [[f"127.0.0.1:{listener.getsockname()[1]}"] for listener in listeners]
    for listener in listeners:
        listener.close()
    (here / "hosts.json").write_text(json.dumps(hosts))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mlx_gpt", *arguments],
            cwd=here,
            env=environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(here / "hosts.json")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ends(pair: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of both; nobody is left waiting."""
    try:
        return [(process.wait(timeout=90), *process.communicate()) for process in pair]
    finally:
        for process in pair:
            process.kill()


@pytest.mark.parametrize("name", [None, *RANK_VARIABLES])
def test_mlx_is_asked_for_others_only_by_one_of_several(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start MPI where that is installed, in every run."""
    asked: list[int] = []
    for known in RANK_VARIABLES:
        monkeypatch.delenv(known, raising=False)
    if name:
        monkeypatch.setenv(name, "0")
    alone = type("Group", (), {"size": lambda self: 1})()
    monkeypatch.setattr("mlx.core.distributed.init", lambda: asked.append(1) or alone)
    assert join() is None
    assert len(asked) == (1 if name else 0)


def losses(run: Path) -> list[tuple[int, int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["tokens"], row["loss"] if "loss" in row else row["val_loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--accumulate 2 --optimizer muon"])
def test_two_processes_have_the_losses_of_one_with_the_same_batch(here: Path, flags: str) -> None:
    more = [*flags.split(), "--steps", "12"]
    assert main([*RUN, *more, "--batch-size", "4", "--out", "alone"]) == 0
    (code, said, _), (code_there, said_there, _) = ends(
        two(*RUN, *more, "--batch-size", "2", "--out", "run", here=here)
    )
    assert (code, code_there) == (0, 0)
    assert "validation loss" in said
    assert said_there == ""
    alone, together = losses(here / "alone"), losses(here / "run")
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    assert [row[2] for row in together] == pytest.approx([row[2] for row in alone], rel=1e-5)
    assert {path.name for path in (here / "run").iterdir()} == {path.name for path in (here / "alone").iterdir()}


@pytest.mark.slow
def test_ctrl_c_in_one_of_them_stops_both_after_the_same_step(here: Path) -> None:
    pair = two(*RUN, "--steps", "300000", "--eval-every", "0", "--embd-pdrop", "0.1", "--out", "run", here=here)
    patience = time.monotonic() + 60
    while not (here / "run/metrics.jsonl").exists() and time.monotonic() < patience:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGINT)
    (code, _, told), (code_there, _, told_there) = ends(pair)
    assert (code, code_there) == (130, 130)
    step = losses(here / "run")[-1][0]
    assert the_line(told.lstrip("\n")) == f"stopped after step {step}; go on with: mlx-gpt train --resume run"
    assert the_line(told_there.lstrip("\n")) == f"stopped after step {step}"
    assert list_checkpoints(here / "run")[0].name == f"step-{step}"


@pytest.mark.slow
def test_a_run_of_two_that_is_resumed_equals_one_that_was_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends(two(*RUN, "--steps", "12", "--embd-pdrop", "0.1", "--out", "run", here=here))
    shutil.copytree(here / "run", here / "whole")
    (list_checkpoints(here / "run")[0] / "SHA256SUMS").unlink()  # so that it goes on after step 8
    assert [code for code, _, _ in ends(two("train", "--resume", "run", here=here))] == [0, 0]
    assert losses(here / "run") == losses(here / "whole")
    assert main(["train", "--resume", "run"]) == 2
    assert "the run was trained by 2 processes, and these are 1" in the_line(capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_pick_the_same(here: Path) -> None:
    pair = two("train", "--data", "text.txt", "--out", "run", "--minutes", "0.1", here=here)
    (code, said, _), (code_there, _, _) = ends(pair)  # with other shapes they would wait for each other
    assert (code, code_there) == (0, 0)
    assert "--learning-rate" in said
    settings = read_run_file(here / "run/run.toml")
    assert "minutes" not in settings  # each has its own clock
    assert losses(here / "run")[-1][:2] == (
        settings["steps"],
        settings["steps"] * 2 * settings["batch_size"] * settings["accumulate"] * settings["n_positions"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("--out model", 2, "--out model exists already"),
        ("--out run --steps 0", 2, "--steps must be at least 1"),
        (
            "--out run --steps 9 --minutes 1",
            2,
            "--minutes is for one process, since each has its own clock; give --steps",
        ),
        ("--out run --learning-rate 1e30 --steps 5", 1, "a lower --learning-rate"),
    ],
)
def test_what_goes_wrong_ends_both(here: Path, flags: str, code: int, told: str) -> None:
    before = everything(here / "model")
    (found, _, said), (found_there, _, said_there) = ends(two(*RUN, *flags.split(), here=here))
    assert found == code
    assert found_there != 0
    assert told in the_line(said)
    line = the_line("\n".join(line for line in said_there.splitlines() if not line.startswith("[ring]")))  # MLX's own
    lost = "lost the other processes of its group ([ring] connection to a peer was lost)"
    assert told in line or lost in line or line == "the first process cannot start; see its output"
    assert everything(here / "model") == before
