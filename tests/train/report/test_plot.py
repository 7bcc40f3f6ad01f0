"""The loss of a run of any length is plotted, with a running mean, by fonts that are listed meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gpt.train.report.plot import plot_loss, prepare_fonts, running_mean


def test_the_running_mean_keeps_a_line_and_smooths_noise() -> None:
    line = np.linspace(5, 1, 200)
    np.testing.assert_allclose(running_mean(line)[2:-2], line[2:-2])
    noise = np.random.default_rng(0).normal(size=2000)
    assert running_mean(noise).std() < 0.25 * noise.std()
    assert running_mean(np.array([3.0])) == [3.0]


def test_fonts_are_listed_beside_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    if font_manager := sys.modules.get("matplotlib.font_manager"):  # put back, since its classes are in use
        monkeypatch.setattr("matplotlib.font_manager", font_manager)
        monkeypatch.delitem(sys.modules, "matplotlib.font_manager")
    prepare_fonts().join(60)
    assert "matplotlib.font_manager" in sys.modules


@pytest.mark.parametrize("n", [0, 1, 500])
def test_a_run_of_any_length_is_plotted(tmp_path: Path, n: int) -> None:
    rows: list[dict[str, Any]] = [{"step": i, "tokens": 8 * i, "loss": 5 - i / 200} for i in range(n)]
    rows += [{"step": n, "tokens": 8 * n, "val_loss": 3.0}, {"step": n, "tokens": 8 * n, "loss": None}]
    plot_loss(rows, {"ln V": 5.5, "unigram": 3.3, "bigram": 3.25}, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
