"""Training keeps a Mac awake until its process ends, and does nothing on other systems."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt.cli import main
from mlx_gpt.train import awake
from mlx_gpt.train.awake import keep_awake

TINY = shlex.split("--tokenizer bytes --n-positions 16 --n-embd 16 --n-layer 1 --n-head 2 --batch-size 2 --steps 1")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Simulate macOS, and record the processes that are started."""
    calls: list[list[str]] = []
    monkeypatch.setattr(awake.sys, "platform", "darwin")
    monkeypatch.setattr(awake.subprocess, "Popen", lambda command, **_: calls.append(command))
    return calls


def test_a_mac_stays_awake_until_the_process_ends(started: list[list[str]]) -> None:
    lines: list[str] = []
    keep_awake(lines.append)
    assert started == [["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]]
    assert lines == ["this Mac stays awake while it trains; --allow-sleep lets it fall asleep"]


def test_a_mac_without_the_tool_is_reported(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(awake.subprocess, "Popen", fail)
    lines: list[str] = []
    keep_awake(lines.append)
    assert lines == ["this Mac may fall asleep and stop the training (/usr/bin/caffeinate: No such file or directory)"]


@pytest.mark.skipif(sys.platform == "darwin", reason="of other systems")
def test_nothing_is_started_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    keep_awake(lambda line: pytest.fail(line))


@pytest.mark.parametrize("allowed", [False, True])
def test_train_keeps_a_mac_awake_unless_it_may_sleep(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("mlx_gpt.commands.train.keep_awake", calls.append)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question " * 40)
    flags = ["--allow-sleep"] if allowed else []
    data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *data, *TINY, *flags]) == 0
    assert len(calls) == (0 if allowed else 1)
