"""A training run, from text and settings to a folder with the model, its metrics and the plot of its loss."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import FolderInUseError, MLXGPTError, Stopped, UsageError
from mlx_gpt.files import LOCK, is_vacant, numbered
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import Checkpoint, CheckpointManager, how_to_continue, load_checkpoint, newest_checkpoint
from mlx_gpt.store.folder import save
from mlx_gpt.store.run_file import RUN_FILE, RunSettings, differences, read_run_file, write_run_file
from mlx_gpt.store.run_lock import locked
from mlx_gpt.text.dataset import Dataset
from mlx_gpt.train.config import LIMITS, TrainConfig
from mlx_gpt.train.distributed import is_main
from mlx_gpt.train.loop import OnEval, Trainer
from mlx_gpt.train.machine import matrix_speed, memory_size, training_flops
from mlx_gpt.train.memory import check_memory
from mlx_gpt.train.report.metrics import RunReport, truncate_metrics
from mlx_gpt.train.report.plot import plot_loss, prepare_fonts
from mlx_gpt.train.report.trackers import open_tracker
from mlx_gpt.train.signals import interruptible

if TYPE_CHECKING:
    from rich.console import Console

PLOT = "loss.png"


def new_model(config: GPTConfig, dataset: Dataset, seed: int) -> GPT:
    """Return an untrained model with the vocabulary of the text; its weights are determined by the seed."""
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
) -> float:
    """Train, write a model folder, ``metrics.jsonl`` and ``loss.png`` to ``out``, and return the validation loss.

    ``out`` must be new or empty (``UsageError``), so that no earlier run is overwritten, and is locked until the end
    (``FolderInUseError``). ``settings``, all that repeat the run, are written there as ``run.toml``, and enable
    checkpoints. ``start`` is the checkpoint of a run in ``out`` to resume. In a ``group`` only the first process
    writes. ``report_to`` names a tracker of the metrics.
    """
    main = is_main(group)
    with interruptible(), ExitStack() as stack:
        if main:
            (lock_run if start else lock_new)(stack, out, console)
        if start and start.progress.data != dataset.hash:
            raise UsageError(f"{out}: the text differs from that of the run to resume; restore it, or start a new run")
        check_memory(model.config, config, memory_size())
        checkpoints = CheckpointManager(out, dataset.tokenizer, config.keep) if settings and main else None
        has_panel = console.is_terminal and not console.quiet
        speed = matrix_speed() / training_flops(model.config) if has_panel else None
        try:
            rows = truncate_metrics(out, start.progress, _reporter(console)) if start and main else []
            with closing(RunReport(out if main else None, console, rows, dataset.tokens_per_byte, speed)) as report:
                trainer = Trainer(model, dataset.train, dataset.val, config, report, on_eval, checkpoints, start, group)
                trainer.progress.data = dataset.hash
                if report_to and main:  # before anything is written, since it may raise
                    report.trackers = [open_tracker(report_to, out, settings or {})]
                if trainer.extension:
                    console.print(trainer.extension)
                if checkpoints and settings and (trainer.extension or not start):
                    write_run_file(out, settings)
                if main:
                    prepare_fonts()  # for the plot at the end
                val_loss = trainer.run()
            if main:
                if checkpoints is None:
                    save(model, dataset.tokenizer, out)
                title = f"{dataset.name}: {model.n_parameters:,} parameters"
                plot_loss(report.rows, dataset.baselines, out / PLOT, title)
        except OSError as error:
            raise _write_error(error, out, checkpoints) from error
        except KeyboardInterrupt as stop:
            if str(stop) or not checkpoints or not checkpoints.newest():
                raise
            signum = getattr(stop, "signum", signal.SIGINT)
            raise Stopped(signum, f"stopped at once; {_how_to_resume(checkpoints)}") from None
        return val_loss


def _write_error(error: OSError, out: Path, checkpoints: CheckpointManager | None) -> MLXGPTError:
    remedy = f"; make room, then {_how_to_resume(checkpoints)}" if checkpoints else ""
    return MLXGPTError(f"{error.filename or out}: cannot be written ({error.strerror}){remedy}")


def _how_to_resume(checkpoints: CheckpointManager) -> str:
    if newest := checkpoints.newest():
        return f"resume from {newest} with: mlx-gpt train --resume {checkpoints.run}"
    if (checkpoints.run / RUN_FILE).exists():
        return how_to_continue(checkpoints.run)
    return "start again"


def last_checkpoint(run: Path, settings: RunSettings, given: Collection[str], console: Console) -> Checkpoint:
    """Load the checkpoint to resume a run from.

    Raises ``UsageError`` if a ``given`` setting differs from the run's, except for its length.
    """
    own = {name: value for name, value in read_run_file(run / RUN_FILE).items() if name not in LIMITS}
    names = {name for name in given if name not in LIMITS and (name in own or name in settings)}
    if found := differences(own, {name: settings.get(name) for name in names}):
        raise UsageError(
            f"--resume {run} continues with its own settings, but: {'; '.join(found)}; remove the flags, or start a "
            f"new run from its model with --init {run}"
        )
    start = load_checkpoint(newest_checkpoint(run, _reporter(console)))
    console.print(f"resuming after step {start.progress.step}", highlight=False)
    return start


def lock_run(stack: ExitStack, run: Path, console: Console) -> None:
    """Lock the folder of a run until the stack is closed. Raises ``FolderInUseError``."""
    stack.enter_context(locked(run, _reporter(console)))


def lock_new(stack: ExitStack, out: Path, console: Console) -> None:
    """Lock the folder of a new run until the stack is closed.

    Raises ``UsageError`` if a new run cannot be written there, ``FolderInUseError`` if another one is.
    """
    if not (out / LOCK).exists():
        check_new(out)  # before a file is written to a folder that is not a run's
    lock_run(stack, out, console)
    check_new(out)


def lock_first_vacant(stack: ExitStack, out: Path, console: Console) -> Path:
    """Lock and return the first of ``out``, ``out-2``, ... that is vacant and that no other run has locked."""
    for folder in filter(is_vacant, numbered(out)):
        with suppress(FolderInUseError), ExitStack() as attempt:
            lock_new(attempt, folder, console)
            stack.enter_context(attempt.pop_all())
            return folder
    raise AssertionError("unreachable: there is no last number")


def check_new(out: Path) -> None:
    """Raise ``UsageError`` unless a new run can be written to ``out``."""
    if not is_vacant(out):
        raise UsageError(f"--out {out} exists already; choose a new folder, or remove it if you do not need it")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "is not writable" if parent.is_dir() else "is not a folder"
        raise UsageError(f"--out {out}: cannot be written, since {parent} {reason}; choose another folder")


def _reporter(console: Console) -> Callable[[str], None]:
    return partial(console.print, markup=False, soft_wrap=True)
