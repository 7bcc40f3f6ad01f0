"""Training checkpoints: all that a run needs to go on as if it had never stopped, each of them whole or not there.

A checkpoint, ``RUN/checkpoints/step-N``, is a model folder, so whatever reads a model reads it. Beside the model lie
``optimizer.safetensors``, ``progress.json``, and ``SHA256SUMS``, the checksums of all files as ``sha256sum -c`` reads
them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.errors import CheckpointError, ModelFolderError
from mlx_gpt.files import atomic_path, fsync, sha256_of
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import read_model, read_tokenizer, save
from mlx_gpt.store.model_config import CONFIG
from mlx_gpt.store.safetensors import WEIGHTS, check_safetensors
from mlx_gpt.text.tokenizer import Tokenizer

CHECKPOINTS = "checkpoints"  # the folder of them, in the run's
METRICS = "metrics.jsonl"
OPTIMIZER, PROGRESS, SUMS = "optimizer.safetensors", "progress.json", "SHA256SUMS"


@dataclass
class RunProgress:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    tokens: int = 0  # seen, in all processes
    position: int = 0  # in the training data, as its batches count
    seconds: float = 0.0  # spent on steps
    best_val_loss: float | None = None  # nats per token, over the windows of an evaluation on the way
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    rows: int = 0  # of metrics.jsonl
    data: str = ""  # hash of the text in its tokens
    random: list[list[int]] = field(default_factory=list)  # MLX's key, of each process


class Checkpoint(NamedTuple):
    """A run as it was saved. ``optimizer`` is its flat state, name -> array."""

    model: GPT
    tokenizer: Tokenizer
    optimizer: dict[str, mx.array]
    progress: RunProgress


@dataclass(frozen=True)
class CheckpointManager:
    """Keeps what a run makes in its folder: the best model, and the last ``keep`` checkpoints."""

    run: Path
    tokenizer: Tokenizer
    keep: int = 2

    def save(self, model: GPT, optimizer: optim.Optimizer, progress: RunProgress) -> None:
        """A checkpoint of this moment, with the metrics until now."""
        if (metrics := self.run / METRICS).exists():
            fsync(metrics)  # its lines are not flushed one by one
        save_checkpoint(self.run, model, self.tokenizer, optimizer, progress, self.keep)

    def newest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return next(iter(list_checkpoints(self.run)), None)

    def export(self, model: GPT) -> None:
        """Make this the run's model."""
        try:
            save(model, self.tokenizer, self.run)
        except ModelFolderError as error:
            raise CheckpointError(f"{error}; then go on with: mlx-gpt train --resume {self.run}") from error

    def best(self) -> GPT:
        """The run's model."""
        return read_model(self.run)


def save_checkpoint(
    run: Path, model: GPT, tokenizer: Tokenizer, optimizer: optim.Optimizer, progress: RunProgress, keep: int = 2
) -> Path:
    """Write the checkpoint of a step and remove all but the last ``keep`` (at least 1); returns its folder.

    It is written under a hidden name, forced onto the disk, and only then called ``step-N``. If anything fails, the
    earlier ones are as they were: ``CheckpointError``.
    """
    folder = run / CHECKPOINTS
    place = folder / f"step-{progress.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # of a process that was killed while it wrote or removed one
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_path(place) as hidden:
            hidden.mkdir()
            _write(hidden, model, tokenizer, optimizer, progress)
            _remove(place)  # only a damaged one can be there
        for old in list_checkpoints(run)[max(1, keep) :]:
            _remove(old)
    except (OSError, RuntimeError, ModelFolderError) as error:
        raise CheckpointError(
            f"{place} could not be saved ({_reason(error)}); the checkpoints before it are as they were: make room, "
            f"then go on with: mlx-gpt train --resume {run}"
        ) from error
    return place


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; whether they are whole is not looked at."""
    found = (path for path in (run / CHECKPOINTS).glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=_step, reverse=True)


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Path:
    """The newest whole checkpoint of a run; ``say`` is told of each that is damaged. ``CheckpointError`` if none is."""
    found = list_checkpoints(run)
    for i, folder in enumerate(found):
        try:
            check_checkpoint(folder)
            return folder
        except CheckpointError as error:
            say(f"{error}; {'the one before it is taken' if i + 1 < len(found) else 'there is none before it'}")
    raise CheckpointError(
        f"{run}: expected a whole checkpoint in {CHECKPOINTS}/, found {len(found) or 'none'}"
        f"{', all damaged' if found else ''}; start again in a new folder: mlx-gpt train --config {run}/run.toml "
        f"--out NEW"
    )


def check_checkpoint(folder: Path) -> None:
    """``CheckpointError`` unless every file is there and is the one that was written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: expected {SUMS}, which cannot be read ({_reason(error)})") from error
    for name in sorted({CONFIG, WEIGHTS, OPTIMIZER, PROGRESS} | sums.keys()):
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder}: expected {name}, which cannot be read ({_reason(error)})") from error
        if found != sums.get(name):
            raise CheckpointError(f"{folder}: {name} is damaged: its checksum is not the one in {SUMS}")


def load_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that has been checked, in memory."""
    model = read_model(folder)
    state = mx.load(str(folder / OPTIMIZER))
    assert isinstance(state, dict)  # as a safetensors file always is
    mx.eval(state)  # now: its file may be removed later
    try:
        progress = RunProgress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: written by another version of mlx-gpt ({error}); resume it with that"
        ) from error
    return Checkpoint(model, read_tokenizer(folder, model.config), state, progress)


def restore_optimizer(optimizer: optim.Optimizer, model: GPT, state: dict[str, mx.array]) -> None:
    """Give an optimizer the state of a checkpoint: before the step is compiled, which would not see it later."""
    optimizer.init(model.trainable_parameters())
    expected = {name: value.shape for name, value in dict(tree_flatten(optimizer.state)).items()}
    if expected != {name: value.shape for name, value in state.items()}:
        raise CheckpointError("the checkpoint's optimizer state is of another optimizer or model; start a new run")
    optimizer.state = tree_unflatten(list(state.items()))


def random_keys(group: mx.distributed.Group | None = None) -> list[list[int]]:
    """MLX's global random state in each process."""
    key = mx.stack(mx.random.state)  # type: ignore[arg-type]  # (1, 2)
    return np.array(mx.distributed.all_gather(key, group=group) if group else key).tolist()


def restore_random_key(key: list[int]) -> None:
    """Put MLX's global random state where it was."""
    mx.random.seed((key[0] << 32) | key[1])


def _write(folder: Path, model: GPT, tokenizer: Tokenizer, optimizer: optim.Optimizer, progress: RunProgress) -> None:
    save(model, tokenizer, folder)
    mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(optimizer.state)))
    check_safetensors(folder / OPTIMIZER)  # a full disk may not have been reported
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), allow_nan=False) + "\n", encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir())
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def _remove(place: Path) -> None:
    """Hidden first, so that half a checkpoint is never called one."""
    if place.exists():
        hidden = Path(tempfile.mkdtemp(prefix=".removed-", dir=place.parent))
        os.rename(place, hidden)  # POSIX: onto an empty folder
        shutil.rmtree(hidden)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
