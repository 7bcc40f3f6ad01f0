"""Two processes that train together equal one process with the same batch; only one of them writes files."""

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
    """Start the same command line in two processes of MLX's ring backend, on this machine."""
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


def wait_for(pair: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of both processes."""
    try:
        return [(process.wait(timeout=90), *process.communicate()) for process in pair]
    finally:
        for process in pair:
            process.kill()


@pytest.mark.parametrize("name", [None, *RANK_VARIABLES])
def test_the_distributed_backend_is_initialised_only_in_a_process_of_a_launcher(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every run would start MPI where it is installed."""
    initialised: list[int] = []
    for known in RANK_VARIABLES:
        monkeypatch.delenv(known, raising=False)
    if name:
        monkeypatch.setenv(name, "0")
    alone = type("Group", (), {"size": lambda self: 1})()
    monkeypatch.setattr("mlx.core.distributed.init", lambda: initialised.append(1) or alone)
    assert join() is None
    assert len(initialised) == (1 if name else 0)


def losses(run: Path) -> list[tuple[int, int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["tokens"], row["loss"] if "loss" in row else row["val_loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--accumulate 2 --optimizer muon"])
def test_two_processes_have_the_losses_of_one_with_the_same_batch(here: Path, flags: str) -> None:
    more = [*flags.split(), "--steps", "12"]
    assert main([*RUN, *more, "--batch-size", "4", "--out", "alone"]) == 0
    (code, output, _), (other_code, other_output, _) = wait_for(
        two(*RUN, *more, "--batch-size", "2", "--out", "run", here=here)
    )
    assert (code, other_code) == (0, 0)
    assert "validation loss" in output
    assert other_output == ""
    alone, together = losses(here / "alone"), losses(here / "run")
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    assert [row[2] for row in together] == pytest.approx([row[2] for row in alone], rel=1e-5)
    assert {path.name for path in (here / "run").iterdir()} == {path.name for path in (here / "alone").iterdir()}


@pytest.mark.slow
def test_a_signal_in_one_process_stops_both_after_the_same_step(here: Path) -> None:
    pair = two(*RUN, "--steps", "300000", "--eval-every", "0", "--embd-pdrop", "0.1", "--out", "run", here=here)
    deadline = time.monotonic() + 60
    while not (here / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    (code, _, message), (other_code, _, other_message) = wait_for(pair)
    assert (code, other_code) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    step = losses(here / "run")[-1][0]
    assert the_line(message.lstrip("\n")) == f"stopped after step {step}; resume with: mlx-gpt train --resume run"
    assert the_line(other_message.lstrip("\n")) == f"stopped after step {step}"
    assert list_checkpoints(here / "run")[0].name == f"step-{step}"


@pytest.mark.slow
@pytest.mark.cpu
def test_a_resumed_run_of_two_processes_equals_an_uninterrupted_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wait_for(two(*RUN, "--steps", "12", "--embd-pdrop", "0.1", "--out", "run", here=here))
    shutil.copytree(here / "run", here / "whole")
    (list_checkpoints(here / "run")[0] / "SHA256SUMS").unlink()  # so that it resumes after step 8
    assert [code for code, _, _ in wait_for(two("train", "--resume", "run", here=here))] == [0, 0]
    assert losses(here / "run") == losses(here / "whole")
    assert main(["train", "--resume", "run"]) == 2
    assert "the run was trained by 2 processes, not 1; resume it with as many" in the_line(capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_choose_the_same_settings(here: Path) -> None:
    pair = two("train", "--data", "text.txt", "--out", "run", "--minutes", "0.05", here=here)
    (code, output, _), (other_code, _, _) = wait_for(pair)  # with different shapes they would deadlock
    assert (code, other_code) == (0, 0)
    assert "--learning-rate" in output
    settings = read_run_file(here / "run/run.toml")
    assert "minutes" not in settings  # each has its own clock
    assert losses(here / "run")[-1][:2] == (
        settings["steps"],
        settings["steps"] * 2 * settings["batch_size"] * settings["accumulate"] * settings["n_positions"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--out model", 2, "--out model exists already"),
        (
            "--out run --steps 9 --minutes 1",
            2,
            "--minutes is for one process, since each has its own clock; give --steps",
        ),
        ("--out run --learning-rate 1e30 --steps 5", 1, "a lower --learning-rate"),
    ],
)
def test_a_failure_ends_both_processes(here: Path, flags: str, code: int, message: str) -> None:
    before = everything(here / "model")
    (found, _, output), (other_found, _, other_output) = wait_for(two(*RUN, *flags.split(), here=here))
    assert found == code
    assert other_found != 0
    assert message in the_line(output)
    line = the_line("\n".join(line for line in other_output.splitlines() if not line.startswith("[ring]")))  # MLX's own
    lost = "lost the other processes of its group ([ring] connection to a peer was lost)"
    assert message in line or lost in line or line == "the first process cannot start; see its output"
    assert everything(here / "model") == before
