"""Runs without plots, and a run to resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.command_line import TEXT
from helpers.runs import RUN, interrupt_during

from mlx_gpt.cli import main
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.train import run as run_module


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take half the time of so short a run."""
    monkeypatch.setattr(run_module, "plot_loss", lambda *_: None)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, stopped after step 10 with checkpoints of steps 8 and 10, and ``whole``, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(run_module, "plot_loss", lambda *_: None)
        assert main([*RUN, "--steps", "24", "--out", "whole"]) == 0
        interrupt_during(patch, 10)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    return folder


@pytest.fixture
def stopped(runs: Path, here: Path) -> Path:
    """A copy of the run stopped after step 10, beside one of ``whole``."""
    for name in ("run", "whole"):
        shutil.copytree(runs / name, here / name)
        settings = here / name / "run.toml"
        settings.write_text(settings.read_text().replace(str(runs), str(here)))  # the path of the text
    load_dataset(str(here / "text.txt"), "bytes")  # whose ids are kept in the cache
    return here / "run"
