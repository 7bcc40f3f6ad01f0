"""Training checkpoints: the complete state of a run, so that it resumes to the bit.

A checkpoint, ``RUN/checkpoints/step-N``, is a model folder, whole or absent. Next to the model are
``optimizer.safetensors``, ``progress.json``, and ``SHA256SUMS``, in the format of ``sha256sum -c``.
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
from mlx_gpt.files import atomic_path, fsync, parse_json, read_small, sha256_of
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import read_model, read_tokenizer, save
from mlx_gpt.store.huggingface import WEIGHTS
from mlx_gpt.store.model_config import CONFIG
from mlx_gpt.store.safetensors import check_safetensors
from mlx_gpt.text.tokenizer import Tokenizer

CHECKPOINTS = "checkpoints"  # a folder in the run's
METRICS = "metrics.jsonl"
MAX_SMALL = 1 << 20  # bytes of a file without arrays
OPTIMIZER, PROGRESS, SUMS = "optimizer.safetensors", "progress.json", "SHA256SUMS"


@dataclass
class RunProgress:
    """The state of a run besides its weights and its optimizer."""

    step: int = 0
    tokens: int = 0  # seen, in all processes
    position: int = 0  # in the training data, in batches
    seconds: float = 0.0  # spent on steps
    best_val_loss: float | None = None  # nats per token, over the windows of an evaluation
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    rows: int = 0  # of metrics.jsonl
    data: str = ""  # hash of the tokenized text
    random: list[list[int]] = field(default_factory=list)  # MLX's random state, of each process
    length: dict[str, float] = field(default_factory=dict)  # the settings of the run's length: steps -> 100
    extended: list[float] = field(default_factory=list)  # of ``Schedule``, if the length was changed

    def __post_init__(self) -> None:
        counts = [self.step, self.tokens, self.position, self.best_step, self.stale, self.rows]
        counts += [word for high, low in self.random for word in (high, low)]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"expected counts, found {counts}")
        numbers = [self.seconds, *self.length.values(), *self.extended]
        numbers += [] if self.best_val_loss is None else [self.best_val_loss]
        if not all(isinstance(value, (int, float)) for value in numbers) or len(self.extended) not in (0, 2):
            raise ValueError(f"expected numbers, found {numbers}")


class Checkpoint(NamedTuple):
    """A run as it was saved. ``optimizer`` is its flat state, name -> array."""

    model: GPT
    tokenizer: Tokenizer
    optimizer: dict[str, mx.array]
    progress: RunProgress


@dataclass(frozen=True)
class CheckpointManager:
    """Saves the best model of a run, and its last ``keep`` checkpoints, in its folder."""

    run: Path
    tokenizer: Tokenizer
    keep: int = 2

    def save(self, model: GPT, optimizer: optim.Optimizer, progress: RunProgress) -> None:
        """Save a checkpoint, and flush the metrics written so far."""
        if (metrics := self.run / METRICS).exists():
            fsync(metrics)  # its lines are not flushed one by one
        save_checkpoint(self.run, model, self.tokenizer, optimizer, progress, self.keep)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return next(iter(list_checkpoints(self.run)), None)

    def export(self, model: GPT) -> None:
        """Save a model as the run's best. Raises ``CheckpointError``."""
        try:
            save(model, self.tokenizer, self.run)
        except ModelFolderError as error:
            raise CheckpointError(f"{error}; then {how_to_continue(self.run)}") from error

    def best(self) -> GPT:
        """Return the run's best model."""
        return read_model(self.run)


def save_checkpoint(
    run: Path, model: GPT, tokenizer: Tokenizer, optimizer: optim.Optimizer, progress: RunProgress, keep: int = 2
) -> Path:
    """Write the checkpoint of a step, remove all but the last ``keep`` (at least 1), and return its folder.

    If anything fails, the earlier ones are unchanged: ``CheckpointError``.
    """
    folder = run / CHECKPOINTS
    place = folder / f"step-{progress.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(place) as hidden:
            _write(hidden, model, tokenizer, optimizer, progress)
            _remove(place)  # only a damaged one can exist
        for old in list_checkpoints(run)[max(1, keep) :]:
            _remove(old)
    except (OSError, RuntimeError, ModelFolderError) as error:
        kept = "the earlier checkpoints are unchanged" if list_checkpoints(run) else "it would have been the first"
        raise CheckpointError(
            f"{place} could not be saved ({_reason(error)}); {kept}: make room, then {how_to_continue(run)}"
        ) from error
    return place


def how_to_continue(run: Path) -> str:
    """Return the remedy for a run that has ended early: resume it, or without a checkpoint start again."""
    if list_checkpoints(run):
        return f"resume with: mlx-gpt train --resume {run}"
    return f"start again in a new folder: mlx-gpt train --config {run}/run.toml --out NEW"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, without checking them."""
    found = (path for path in (run / CHECKPOINTS).glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def newest_checkpoint(run: Path, report: Callable[[str], None]) -> Path:
    """Return the newest whole checkpoint of a run, and ``report`` each damaged one. Raises ``CheckpointError``."""
    found = list_checkpoints(run)
    for i, folder in enumerate(found):
        try:
            check_checkpoint(folder)
            return folder
        except CheckpointError as error:
            report(f"{error}; {'the one before it is used' if i + 1 < len(found) else 'there is none before it'}")
    raise CheckpointError(
        f"{run}: expected a whole checkpoint in {CHECKPOINTS}/, found {len(found) or 'none'}"
        f"{', all damaged' if found else ''}; start again in a new folder: mlx-gpt train --config {run}/run.toml "
        f"--out NEW"
    )


def check_checkpoint(folder: Path) -> None:
    """Raise ``CheckpointError`` unless every file has the checksum it was written with."""
    try:
        lines = read_small(folder / SUMS, MAX_SMALL).decode("utf-8").removesuffix("\n").split("\n")
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
    """Load a checkpoint that has been checked."""
    model = read_model(folder)
    try:
        state = mx.load(str(folder / OPTIMIZER))
        mx.eval(state)  # its file may be removed later
    except RuntimeError as error:
        raise CheckpointError(f"{folder / OPTIMIZER}: cannot be read ({error})") from error
    assert isinstance(state, dict)  # as a safetensors file always is
    try:
        progress = RunProgress(**parse_json(read_small(folder / PROGRESS, MAX_SMALL)))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: saved by another version of mlx-gpt ({error}); resume with it") from error
    return Checkpoint(model, read_tokenizer(folder, model.config), state, progress)


def restore_optimizer(optimizer: optim.Optimizer, model: GPT, state: dict[str, mx.array]) -> None:
    """Set an optimizer to the state of a checkpoint, before the step is compiled: later it would not be seen."""
    optimizer.init(model.trainable_parameters())
    expected = {name: (value.shape, value.dtype) for name, value in dict(tree_flatten(optimizer.state)).items()}
    if expected != {name: (value.shape, value.dtype) for name, value in state.items()}:
        raise CheckpointError("the checkpoint's optimizer state is of another optimizer or model; start a new run")
    optimizer.state = tree_unflatten(list(state.items()))


def random_keys(group: mx.distributed.Group | None = None) -> list[list[int]]:
    """Return MLX's global random state of each process."""
    key = mx.stack(mx.random.state)  # type: ignore[arg-type]  # (1, 2)
    return np.array(mx.distributed.all_gather(key, group=group) if group else key).tolist()


def restore_random_key(key: list[int]) -> None:
    """Set MLX's global random state."""
    mx.random.seed((key[0] << 32) | key[1])


def _write(folder: Path, model: GPT, tokenizer: Tokenizer, optimizer: optim.Optimizer, progress: RunProgress) -> None:
    save(model, tokenizer, folder)
    mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(optimizer.state)))
    check_safetensors(folder / OPTIMIZER)  # a full disk may not have been reported
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), allow_nan=False) + "\n", encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir())
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def _remove(place: Path) -> None:
    """Remove a checkpoint, hidden first: a half-removed one never has its name."""
    if place.exists():
        hidden = Path(tempfile.mkdtemp(prefix=".removed-", dir=place.parent))
        os.rename(place, hidden)  # POSIX: onto an empty folder
        shutil.rmtree(hidden)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
