"""Data parallel training: every process takes its own rows, and the gradients are averaged over all of them.

``mlx.launch -n 2 -- mlx-gpt train ...`` starts the processes and tells each its rank; MLX finds the rest by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import MLXGPTError

# What mlx.launch, and mpirun of Open MPI and of MPICH, tell each process they start.
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")


def join() -> mx.distributed.Group | None:
    """The processes that train together, or None where this one trains alone.

    Unless somebody started it as one of several, MLX is not asked: it would start MPI wherever that is installed, and
    MPI ends the process where it finds no network to its liking.
    """
    if not any(name in os.environ for name in RANKS):
        return None
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise MLXGPTError(
            f"expected the other processes of this training, but they cannot be reached ({error}); start all of them, "
            f"with the same hosts"
        ) from error
    return group if group.size() > 1 else None


def rank(group: mx.distributed.Group | None) -> int:
    """Which of them this process is: 0 to size - 1."""
    return group.rank() if group else 0


def size(group: mx.distributed.Group | None) -> int:
    """How many processes train together."""
    return group.size() if group else 1


def is_main(group: mx.distributed.Group | None) -> bool:
    """Whether this is the one process that writes files and speaks."""
    return rank(group) == 0


def smallest(values: Sequence[float], group: mx.distributed.Group | None) -> list[float]:
    """Of each value the smallest that any of the processes has: the same in all of them."""
    if group is None:
        return list(values)
    of_all = mx.distributed.all_gather(mx.array([values], mx.float32), group=group)  # (processes, values)
    return [float(value) for value in np.array(of_all).min(axis=0)]


@contextmanager
def peers(group: mx.distributed.Group | None) -> Iterator[None]:
    """In here, to lose the others is one clear line: ``MLXGPTError``."""
    try:
        yield
    except RuntimeError as error:
        if group is None:
            raise
        raise MLXGPTError(f"this process lost the others it trains with ({error}); look at what they said") from error


def for_all(group: mx.distributed.Group | None, check: Callable[[], None]) -> None:
    """Let the first process check something; where it fails, the others end too, instead of waiting for it."""
    trouble: MLXGPTError | None = None
    if is_main(group):
        try:
            check()
        except MLXGPTError as error:
            trouble = error
    failed = group is not None and mx.distributed.all_sum(mx.array(int(trouble is not None)), group=group).item()
    if trouble:
        raise trouble
    if failed:
        raise MLXGPTError("the first process cannot begin; look at what it said")


@contextmanager
def main_first(group: mx.distributed.Group | None) -> Iterator[None]:
    """What is in here the first process does alone, then the others: it may fill a cache that they share."""
    if group and not is_main(group):
        wait_for_all(group)
    yield
    if group and is_main(group):
        wait_for_all(group)


def wait_for_all(group: mx.distributed.Group) -> None:
    """Until every process has come here."""
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
