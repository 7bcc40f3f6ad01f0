"""A whole run: from text and settings to a folder with the model, its metrics and the plot of its loss."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import Checkpoint, CheckpointManager, load_checkpoint, newest_checkpoint
from mlx_gpt.store.folder import save
from mlx_gpt.store.run_file import RUN_FILE, RunSettings, differences, read_run_file, write_run_file
from mlx_gpt.text.dataset import Dataset
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.distributed import is_main
from mlx_gpt.train.loop import OnEval, Trainer
from mlx_gpt.train.machine import matrix_speed, memory_size, training_flops
from mlx_gpt.train.memory import check_memory
from mlx_gpt.train.report.metrics import Report, keep_rows
from mlx_gpt.train.report.plot import plot_loss
from mlx_gpt.train.report.trackers import open_tracker

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Run:
    """What a run leaves: the trained model, the folder it lies in, its validation loss (nats per token)."""

    model: GPT
    tokenizer: Tokenizer
    folder: Path
    val_loss: float
    plot: Path


def new_model(config: GPTConfig, dataset: Dataset, seed: int) -> GPT:
    """An untrained model with the vocabulary of the text; the same weights for the same seed."""
    mx.random.seed(seed)
    return GPT(replace(config, vocab_size=dataset.tokenizer.vocab_size))


def run(
    model: GPT,
    dataset: Dataset,
    config: TrainConfig,
    out: Path,
    console: Console,
    on_eval: OnEval | None = None,
    settings: RunSettings | None = None,
    start: Checkpoint | None = None,
    group: mx.distributed.Group | None = None,
    report_to: str = "",
) -> Run:
    """Train, and leave in ``out`` a model folder, ``metrics.jsonl`` and ``loss.png``.

    ``out`` must be new or empty (``UsageError``): nothing of an earlier run is ever overwritten. With ``settings``, all
    that it takes to repeat the run, they are written there as ``run.toml``, and checkpoints are kept. ``start`` is the
    checkpoint of a run in ``out`` to go on from. In a ``group`` only the first process writes. ``report_to`` names a
    tracker that gets the metrics too.
    """
    if start is None and is_main(group):
        check_new(out)
    if start and start.progress.data != dataset.hash:
        raise UsageError(f"{out}: the text is not the one that the run began with; bring it back, or start a new run")
    check_memory(model.config, config, memory_size())
    keeper = CheckpointManager(out, dataset.tokenizer, config.keep) if settings and is_main(group) else None
    try:
        rows = keep_rows(out, start.progress.rows) if start and is_main(group) else []
        with closing(_report(out if is_main(group) else None, console, rows, model, dataset)) as report:
            trainer = Trainer(model, dataset.train, dataset.val, config, report, on_eval, keeper, start, group)
            trainer.progress.data = dataset.hash
            if report_to and is_main(group):  # before anything is written: it may refuse
                report.trackers = [open_tracker(report_to, out, settings or {})]
            if keeper and settings and not start:
                out.mkdir(parents=True, exist_ok=True)
                write_run_file(out, settings)
            val_loss = trainer.run()
    except OSError as error:
        raise _stopped_by(error, out, keeper) from error
    except KeyboardInterrupt as stop:
        if stop.args or not keeper or not keeper.newest():
            raise
        raise KeyboardInterrupt(f"stopped at once; {_go_on(keeper)}") from None
    plot = out / "loss.png"
    if is_main(group):
        if keeper is None:
            save(model, dataset.tokenizer, out)
        plot_loss(report.rows, dataset.baselines, plot, f"{dataset.name}: {model.n_parameters:,} parameters")
    return Run(model, dataset.tokenizer, out, val_loss, plot)


def _report(folder: Path | None, console: Console, rows: list[dict[str, Any]], model: GPT, dataset: Dataset) -> Report:
    speed = matrix_speed() if console.is_terminal and not console.quiet else None  # only the panel shows its share
    return Report(
        folder,
        console,
        rows,
        tokens_per_byte=dataset.tokens_per_byte,
        flops_per_token=training_flops(model.config),
        machine_flops=speed,
    )


def _stopped_by(error: OSError, out: Path, keeper: CheckpointManager | None) -> MLXGPTError:
    way_on = f"; make room, then {_go_on(keeper)}" if keeper and keeper.newest() else ""
    return MLXGPTError(f"{error.filename or out}: cannot be written ({error.strerror}){way_on}")


def _go_on(keeper: CheckpointManager) -> str:
    return f"go on from {keeper.newest()}, which is whole, with: mlx-gpt train --resume {keeper.run}"


def last_checkpoint(run: Path, settings: RunSettings, given: Collection[str], console: Console) -> Checkpoint:
    """What a run goes on from. ``UsageError`` where one of the settings that are ``given`` is not the run's."""
    of_the_run = read_run_file(run / RUN_FILE)
    if found := differences(of_the_run, {name: value for name, value in settings.items() if name in given}):
        raise UsageError(
            f"--resume {run} goes on with its own settings, but: {'; '.join(found)}; leave them out, or start a new "
            f"run from its model with --init {run}"
        )
    start = load_checkpoint(newest_checkpoint(run, partial(console.print, markup=False, soft_wrap=True)))
    console.print(f"going on after step {start.progress.step}", highlight=False)
    return start


def check_new(out: Path) -> None:
    """``UsageError`` unless a run may be written there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; choose a new folder, or remove it if you do not need it")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is not a folder"
        raise UsageError(f"--out {out}: nothing can be written there, since {there} {why}; choose another folder")
