"""Experiment trackers that receive the metrics of a run. A new one is a class and an entry in ``TRACKERS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlx_gpt.errors import UsageError


class Tracker(Protocol):
    """Receives rows of metrics; no method waits for a network."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Record one row of ``RunReport``: ``step``, ``tokens`` and measured values."""

    def close(self) -> None:
        """Write what is buffered."""


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
    """A run of Weights & Biases, named after the folder and configured by wandb's own ``WANDB_MODE``, ...

    The id is stored in the folder, so that a resumed run continues the same run there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project="mlx-gpt", name=folder.name, dir=str(folder), config=dict(settings), id=run_id, resume="allow"
            )
            id_file.write_text(self._run.id)
        except wandb.errors.Error as error:  # such as no login or no network
            raise UsageError(f"--report-to wandb: {error} WANDB_MODE=offline keeps it on this machine.") from error

    def row(self, row: Mapping[str, Any]) -> None:
        self._run.log(_measured(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


# The values of --report-to, with the package that each needs; the extra of mlx-gpt that installs it has the same name.
TRACKERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
}


def check_tracker(kind: str) -> None:
    """Raise ``UsageError`` for a tracker that is unknown or not installed."""
    if kind not in TRACKERS:
        raise UsageError(f"--report-to must be one of {', '.join(TRACKERS)}, not {kind!r}")
    if not find_spec(package := TRACKERS[kind][0]):
        raise UsageError(
            f"--report-to {kind} needs {package}, which is not installed; run: pip install 'mlx-gpt[{kind}]'"
        )


def open_tracker(kind: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Return the tracker of a run in ``folder``. Raises ``UsageError`` if it cannot start."""
    check_tracker(kind)
    return TRACKERS[kind][1](folder, settings)


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
