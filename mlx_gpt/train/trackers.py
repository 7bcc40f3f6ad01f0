"""Where metrics can go beside the run's own folder: TensorBoard's event files, or Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mlx_gpt.errors import UsageError

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Keeps rows of metrics somewhere; neither method waits for a network."""

    def row(self, row: Mapping[str, Any]) -> None:
        """One row as ``Report`` writes it: ``step``, ``tokens`` and what was measured."""

    def close(self) -> None:
        """Write out what is still on its way."""


def open_tracker(kind: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """The tracker of a run in ``folder``, told the run's settings. ``UsageError`` where it is not installed."""
    if kind == "tensorboard":
        return TensorBoard(folder, settings)
    if kind == "wandb":
        return WandB(folder, settings)
    raise UsageError(f"--report-to must be one of {', '.join(TRACKERS)}, not {kind!r}")


class TensorBoard:
    """Event files in ``folder/tensorboard``, for ``tensorboard --logdir``. Written by a thread of tensorboardX."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UsageError(_missing("tensorboard", "tensorboardX")) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in settings.items()))

    def row(self, row: Mapping[str, Any]) -> None:
        for name, value in _measured(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named after the folder. Where it goes is wandb's to know (``WANDB_MODE``, ...)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UsageError(_missing("wandb", "wandb")) from error
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(project="mlx-gpt", name=folder.name, dir=str(folder), config=dict(settings))
        except wandb.errors.Error as error:  # nobody is logged in, or no network
            raise UsageError(f"--report-to wandb: {error}") from error

    def row(self, row: Mapping[str, Any]) -> None:
        self._run.log(_measured(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def _missing(kind: str, package: str) -> str:
    return f"--report-to {kind} needs {package}, which is not installed; install it with: pip install 'mlx-gpt[{kind}]'"
