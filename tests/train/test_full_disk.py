"""A full disk is reported with a remedy, and leaves the checkpoints of before."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import everything, the_line
from helpers.runs import RUN, assert_same_run

from mlx_gpt.cli import main
from mlx_gpt.store import checkpoint as checkpoint_module
from mlx_gpt.store import folder
from mlx_gpt.store.checkpoint import CheckpointManager
from mlx_gpt.train import run as run_module

pytestmark = pytest.mark.usefixtures("no_plots")


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
