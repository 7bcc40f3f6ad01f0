"""The step follows its formula; runs are reproducible, or end with one clear line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from math import log, sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.small_training import SMALL, batch, new_small, weights
from mlx.utils import tree_flatten
from rich.console import Console

from mlx_gpt import device
from mlx_gpt.device import n_lanes
from mlx_gpt.errors import DataError, MLXGPTError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load
from mlx_gpt.text.dataset import Dataset, dataset_from_texts
from mlx_gpt.text.windows import Windows, endless_batches
from mlx_gpt.tinyworld import stories as tinyworld
from mlx_gpt.train import clock as clock_module
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loop import Trainer
from mlx_gpt.train.loss import mean_loss, next_token_losses
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.report.metrics import RunReport
from mlx_gpt.train.run import new_model, run
from mlx_gpt.train.step import make_eval_step, make_train_step
from mlx_gpt.train.validation import evaluate

QUICK = TrainConfig(steps=6, batch_size=4, eval_every=3, eval_windows=2)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A few stories, as bytes."""
    stories = tinyworld.generate_stories(12, seed=0)
    return dataset_from_texts("a few stories", stories[:10], stories[10:], "bytes")


def quiet() -> Console:
    return Console(file=StringIO())


# The step


def one_step(model: GPT, clip: float = 1e9, optimizer: Any = None) -> tuple[float, float, dict[str, np.ndarray]]:
    """Loss, gradient norm and gradient of a step: what SGD with a learning rate of 1 subtracts."""
    before = weights(model)
    step, state = make_train_step(model, optimizer or optim.SGD(1.0), TrainConfig(grad_clip=clip, batch_size=4))
    loss, norm = step(*batch())
    mx.eval(loss, norm, state)
    return loss.item(), norm.item(), {name: before[name] - w for name, w in weights(model).items()}


def test_the_compiled_step_follows_the_gradient_of_the_mean_loss() -> None:
    model = new_small()
    loss, gradient = nn.value_and_grad(model, lambda x, y: mean_loss(model(x), y))(*batch())
    expected = {name: np.array(g) for name, g in tree_flatten(gradient)}
    norm_expected = sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values()))
    found_loss, norm, found = one_step(model)
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    assert norm == pytest.approx(norm_expected, rel=1e-5)
    for name, g in expected.items():
        np.testing.assert_allclose(found[name], g, atol=1e-6)


def test_a_gradient_is_clipped_to_the_maximum_norm_and_keeps_its_direction() -> None:
    _, norm, whole = one_step(new_small())
    _, norm_again, clipped = one_step(new_small(), clip=norm / 4)
    assert norm_again == pytest.approx(norm)  # the norm before clipping
    for name, g in whole.items():
        np.testing.assert_allclose(clipped[name], g / 4, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX's CPU backend for Linux needs lanes")
@pytest.mark.parametrize("n", [2, 4])
def test_a_batch_spread_over_lanes_gives_the_loss_and_gradient_of_one(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gpt.device.cores", lambda: 1)
    loss, norm, gradient = one_step(new_small())
    monkeypatch.setattr("mlx_gpt.device.cores", lambda: n)
    loss_beside, norm_beside, gradient_beside = one_step(new_small())
    assert loss_beside == pytest.approx(loss, abs=1e-6)
    assert norm_beside == pytest.approx(norm, abs=1e-6)
    for name, g in gradient.items():
        np.testing.assert_allclose(gradient_beside[name], g, atol=1e-6)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize(
    ("batch_size", "cores", "lanes"), [(4, 1, 1), (4, 2, 2), (4, 3, 2), (9, 4, 3), (7, 4, 1), (8, 16, 8)]
)
def test_rows_are_spread_evenly_over_the_cores_only_on_linux_without_a_gpu(
    batch_size: int, cores: int, lanes: int, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_gpt.device.cores", lambda: cores)
    monkeypatch.setattr("mlx_gpt.device.sys.platform", platform)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert n_lanes(batch_size) == (lanes if platform == "linux" else 1)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert n_lanes(batch_size) == 1


def test_dropout_differs_between_steps_and_is_determined_by_the_seed() -> None:
    def losses() -> list[float]:
        model = new_small(replace(SMALL, embd_pdrop=0.5))
        step, state = make_train_step(model, optim.SGD(0.0), TrainConfig(batch_size=4))
        found = []
        for _ in range(4):
            loss, _ = step(*batch())
            mx.eval(loss, state)
            found.append(loss.item())
        return found

    assert len(set(losses())) == 4  # the weights do not change, only the mask
    assert losses() == losses()


def test_a_small_model_memorizes_one_batch() -> None:
    model = new_small(replace(SMALL, n_embd=32))
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.0, batch_size=4)
    step, state = make_train_step(model, make_optimizer(config, 2), config)
    for _ in range(150):
        loss, _ = step(*batch())
        mx.eval(loss, state)
    assert loss.item() < 0.05  # from ln 257 = 5.5


# Validation


@pytest.mark.parametrize(("n_windows", "batch_size"), [(0, 4), (0, 3), (6, 2), (7, 2), (1, 8)])
def test_the_validation_loss_is_the_mean_over_the_counted_targets(
    dataset: Dataset, n_windows: int, batch_size: int
) -> None:
    model = new_small(replace(SMALL, embd_pdrop=0.5))
    windows = Windows.over(dataset.val, SMALL.n_positions)
    n = n_windows or len(windows)
    rows = np.array([round(i * (len(windows) - 1) / max(1, n - 1)) for i in range(n)])
    x, y, counts = windows.batch(rows)
    model.eval()
    expected = np.array(next_token_losses(model(x), mx.array(y)))[counts].mean()
    model.train()
    assert evaluate(model, make_eval_step(model), windows, batch_size, n_windows) == pytest.approx(expected, rel=1e-5)
    assert model.training  # as it was


def test_a_short_text_is_measured_whole(dataset: Dataset) -> None:
    model = new_small().eval()
    windows = Windows.over(dataset.val, SMALL.n_positions)
    assert windows.counted.sum() == dataset.val.n_tokens
    assert not model.training
    evaluate(model, make_eval_step(model), windows, 4)
    assert not model.training


# Runs


def trained(dataset: Dataset, out: Path, config: TrainConfig = QUICK, **architecture: Any) -> tuple[GPT, float]:
    model = new_model(replace(SMALL, **architecture), dataset, config.seed)
    return model, run(model, dataset, config, out, quiet())


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_model_folder_that_loads_with_the_same_logits(dataset: Dataset, tmp_path: Path) -> None:
    trained_model, _ = trained(dataset, tmp_path / "run")
    model, tokenizer = load(tmp_path / "run")
    assert mx.array_equal(model(batch()[0]), trained_model(batch()[0]))
    assert tokenizer.hash == dataset.tokenizer.hash
    assert not model.training
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_slow_start_is_reported_for_the_first_step(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "begun", set())
    trained(dataset, tmp_path / "run")
    assert device.begun == {"step"}


def test_metrics_have_the_promised_names_and_true_values(dataset: Dataset, tmp_path: Path) -> None:
    _, val_loss = trained(dataset, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    measured = ["step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"]
    assert [list(row) for row in steps] == [measured] * 6
    assert [list(row) for row in evaluations] == [["step", "tokens", "val_loss", "bits_per_byte"]] * 2
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["tokens"] for row in steps] == [n * 4 * 16 for n in range(1, 7)]
    assert evaluations[-1]["val_loss"] == val_loss
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 0 for row in steps)
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3 * 0.1)  # the final share of the peak
    assert steps[0]["loss"] == pytest.approx(log(257), abs=0.1)


def test_the_first_loss_is_that_of_the_untrained_model_on_the_first_batch(dataset: Dataset, tmp_path: Path) -> None:
    trained(dataset, tmp_path / "run")
    x, y = next(endless_batches(dataset.train, 16, 4, QUICK.seed))
    untrained = new_model(SMALL, dataset, QUICK.seed)
    assert rows_of(tmp_path / "run")[0]["loss"] == pytest.approx(mean_loss(untrained(x), mx.array(y)).item(), rel=1e-6)


def test_the_last_validation_loss_is_that_of_the_saved_model_over_all_windows(dataset: Dataset, tmp_path: Path) -> None:
    _, val_loss = trained(dataset, tmp_path / "run", embd_pdrop=0.2)
    model, _ = load(tmp_path / "run")
    windows = Windows.over(dataset.val, 16)
    assert evaluate(model, make_eval_step(model), windows, 4) == pytest.approx(val_loss, rel=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_runs_with_the_same_seed_are_equal_to_the_bit(dataset: Dataset, tmp_path: Path, optimizer: str) -> None:
    config = replace(QUICK, optimizer=optimizer)
    once, again, other = (
        trained(dataset, tmp_path / name, replace(config, seed=seed), embd_pdrop=0.1)
        for name, seed in (("once", 1), ("again", 1), ("other", 2))
    )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again", "other")]
    assert files[0] == files[1] != files[2]
    assert once[1] == again[1] != other[1]


def test_a_run_with_a_time_limit_ends_in_time(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(next(now)))  # a second per call
    trained(dataset, tmp_path / "run", replace(QUICK, steps=None, minutes=1.0, eval_every=0))
    n = rows_of(tmp_path / "run")[-1]["step"]
    assert 6 < n < 60


def test_on_eval_is_called_in_eval_mode_and_training_continues(dataset: Dataset, tmp_path: Path) -> None:
    model = new_small(replace(SMALL, embd_pdrop=0.2))
    seen = []

    def on_eval(step: int, done: float) -> None:
        seen.append((step, done, model.training))

    report = RunReport(tmp_path, quiet())
    Trainer(model, dataset.train, dataset.val, QUICK, report, on_eval).run()
    report.close()
    assert seen == [(3, 0.5, False)]
    assert report.rows[-1]["step"] == 6


def test_a_loss_that_is_nan_or_inf_ends_the_run_with_one_clear_line(dataset: Dataset, tmp_path: Path) -> None:
    message = r"the loss became (nan|inf) at step \d \(largest gradient: [\w.]+, \S+\); a lower --learning-rate"
    with pytest.raises(MLXGPTError, match=message) as e:
        trained(dataset, tmp_path / "run", replace(QUICK, learning_rate=1e30))
    assert "\n" not in str(e.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]  # no half-written model
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "run") if "loss" in row)


def test_an_overflow_in_float16_is_reported_with_the_largest_gradient(dataset: Dataset, tmp_path: Path) -> None:
    message = (
        r"the (loss|gradient's norm) became (nan|inf) at step 1 \(largest gradient: [\w.]+, [\d.e+]+\); float16 ends "
        r"at 65504, which --dtype bfloat16 does not; or a lower --learning-rate"
    )
    with pytest.raises(MLXGPTError, match=message):
        trained(dataset, tmp_path / "run", replace(QUICK, dtype="float16"), initializer_range=1e3)


def test_a_step_whose_loss_is_nan_leaves_the_weights_unchanged() -> None:
    model = new_small(replace(SMALL, initializer_range=1e3))
    config = TrainConfig(batch_size=4, dtype="float16")
    step, state = make_train_step(model, make_optimizer(config, 2), config)
    before = weights(model)
    loss, _ = step(*batch())
    mx.eval(loss, state)
    assert not np.isfinite(loss.item())
    after = weights(model)
    assert all(np.allclose(after[name], before[name], rtol=1e-3) for name in before)  # except for weight decay


def test_an_existing_folder_is_refused_and_unchanged(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists already; choose a new folder"):
        trained(dataset, tmp_path)
    with pytest.raises(UsageError, match=r"exists already"):
        trained(dataset, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_cannot_start_creates_nothing(tmp_path: Path) -> None:
    short = dataset_from_texts("short", ["ab"], ["cd"], "bytes")
    with pytest.raises(DataError, match="shorter than one window: 3 tokens"):
        trained(short, tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints_that_is_interrupted_leaves_only_its_metrics(
    dataset: Dataset, tmp_path: Path
) -> None:
    def stop(step: int, done: float) -> None:
        raise KeyboardInterrupt

    model = new_model(SMALL, dataset, 0)
    with pytest.raises(KeyboardInterrupt):
        run(model, dataset, QUICK, tmp_path / "run", quiet(), stop)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert len(rows_of(tmp_path / "run")) == 4


# Baselines


def test_baselines_go_from_ln_V_to_the_best_possible_loss() -> None:
    stories = tinyworld.generate_stories(60, seed=0)
    made = dataset_from_texts("tinyworld", stories[:50], stories[50:], "bpe:300")
    assert list(made.baselines) == ["ln V", "unigram", "bigram", "best possible"]
    assert list(made.baselines.values()) == sorted(made.baselines.values(), reverse=True)
    assert made.baselines["ln V"] == log(300)
    assert made.baselines["best possible"] == tinyworld.best_loss(stories[50:], made.val.n_tokens)
    assert "best possible" not in dataset_from_texts("mine", stories[:50], stories[50:], "bpe:300").baselines
