"""The best model of a run is kept, and patience ends a run that no longer improves."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import OVERFIT, RUN, assert_same_run, interrupt_during, newest, noise, rows

from mlx_gpt.cli import main
from mlx_gpt.store.folder import load
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.windows import Windows
from mlx_gpt.train.step import make_eval_step
from mlx_gpt.train.validation import evaluate

pytestmark = pytest.mark.usefixtures("no_plots")


def full_loss(folder: Path, text: Path) -> float:
    model, tokenizer = load(folder)
    dataset = load_dataset(str(text), tokenizer)
    windows = Windows.over(dataset.val, model.config.n_positions)
    return evaluate(model, make_eval_step(model), windows, 4)


def test_patience_ends_the_run_with_the_best_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(here)
    assert main([*OVERFIT, "--steps", "400", "--patience", "3", "--out", "run"]) == 0
    evaluations = [(row["step"], row["val_loss"]) for row in rows(here / "run") if "val_loss" in row]
    best_step, best = min(evaluations, key=lambda one: one[1])
    during_training = evaluations[:-1]  # the last one is over all of the text
    assert [step for step, _ in during_training] == list(range(5, best_step + 5 * 3 + 1, 5))
    assert evaluations[-1][1] > best
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-5)
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
        assert full_loss(here / name, here / "text.txt") == pytest.approx(last["val_loss"], rel=1e-5)


def test_the_best_model_can_be_used_during_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_during(patch, 7)
        assert main([*RUN, "--steps", "24", "--out", "run"]) == 130
    best = next(row["val_loss"] for row in rows(here / "run") if "val_loss" in row)
    assert full_loss(here / "run", here / "text.txt") == pytest.approx(best, rel=1e-5)
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
