"""A resumed run of another length than the one it was started with.

The learning rate follows the schedule of the new length. Where that is higher, as after the end of a run, it rises
linearly from its last value to the peak over the share ``warmup`` of what is left, and meets the schedule on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlx_gpt.errors import UsageError
from mlx_gpt.store.checkpoint import RunProgress
from mlx_gpt.train.clock import Clock
from mlx_gpt.train.config import LIMITS, TrainConfig
from mlx_gpt.train.schedule import Schedule


def extend(
    progress: RunProgress, config: TrainConfig, clock: Callable[[TrainConfig], Clock], schedule: Schedule
) -> str:
    """Adapt a checkpoint's ``progress`` and the ``schedule`` if the run has another length now; return a report, or "".

    All of it follows from the checkpoint and ``config``, so that a run that is killed soon afterwards can be resumed.
    Counts evaluations without improvement (``patience``) anew. Raises ``UsageError`` if the new length has passed.
    """
    before, now = progress.length, config.length
    progress.length = now
    if before in ({}, now):
        return ""
    old = replace(config, **{name: before.get(name) for name in LIMITS})  # type: ignore[arg-type]
    done, n = clock(config).done(progress.step), progress.step
    if done >= 1:
        raise UsageError(
            f"{_flags(now)} has passed: the run has had {n} steps, {progress.tokens} tokens, "
            f"{progress.seconds / 60:.3g} minutes; give a total, counted from the beginning of the run"
        )
    schedule.extended = progress.extended = [done, schedule.factor(clock(old).done(n))]
    progress.stale = 0
    return f"the length of the run is {_flags(now)} in all, no longer {_flags(before)}"


def _flags(length: dict[str, float]) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in length.items())
