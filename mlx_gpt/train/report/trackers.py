"""Where metrics can go beside the run's own folder: TensorBoard's event files, or Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlx_gpt.errors import UsageError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what each tracker needs


class Tracker(Protocol):
    """Keeps rows of metrics somewhere; neither method waits for a network."""

    def row(self, row: Mapping[str, Any]) -> None:
        """One row as ``Report`` writes it: ``step``, ``tokens`` and what was measured."""

    def close(self) -> None:
        """Write out what is still on its way."""


def check_tracker(kind: str) -> None:
    """``UsageError`` unless ``open_tracker`` knows it and it is installed."""
    if kind not in PACKAGES:
        raise UsageError(f"--report-to must be one of {', '.join(PACKAGES)}, not {kind!r}")
    if not find_spec(PACKAGES[kind]):
        raise UsageError(
            f"--report-to {kind} needs {PACKAGES[kind]}, which is not installed; install it with: "
            f"pip install 'mlx-gpt[{kind}]'"
        )


def open_tracker(kind: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """The tracker of a run in ``folder``, told the run's settings. ``UsageError`` where it cannot begin."""
    check_tracker(kind)
    return TensorBoard(folder, settings) if kind == "tensorboard" else WandB(folder, settings)


class TensorBoard:
    """Event files in ``folder/tensorboard``, for ``tensorboard --logdir``. Written by a thread of tensorboardX."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in settings.items()))

    def row(self, row: Mapping[str, Any]) -> None:
        for name, value in _measured(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named after the folder. Where it goes is wandb's to know (``WANDB_MODE``, ...).

    A run that is resumed goes on with the same one there: its id is kept in the folder.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb-id.txt"
        known = kept.read_text().strip() if kept.exists() else None
        try:
            self._run = wandb.init(
                project="mlx-gpt", name=folder.name, dir=str(folder), config=dict(settings), id=known, resume="allow"
            )
            kept.write_text(self._run.id)
        except wandb.errors.Error as error:  # nobody is logged in, or no network
            raise UsageError(f"--report-to wandb: {error} WANDB_MODE=offline keeps it on this machine.") from error

    def row(self, row: Mapping[str, Any]) -> None:
        self._run.log(_measured(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
