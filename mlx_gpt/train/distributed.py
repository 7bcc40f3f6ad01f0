"""Data-parallel training: each process computes its own rows of a batch, and the gradients are averaged.

``mlx.launch -n 2 -- mlx-gpt train ...`` starts the processes. In all functions a ``group`` of None is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import MLXGPTError

# Set in each process by mlx.launch and by mpirun of Open MPI and MPICH.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
T = TypeVar("T")


def join() -> mx.distributed.Group | None:
    """Return the group of processes that train together, or None if there is only this one.

    MLX's distributed backend is initialised only in a process started by a launcher: otherwise MLX would start MPI
    wherever it is installed, and MPI ends the process if it finds no usable network.
    """
    if not any(name in os.environ for name in RANK_VARIABLES):
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
    """Return the index of this process: 0 to size - 1."""
    return group.rank() if group else 0


def size(group: mx.distributed.Group | None) -> int:
    """Return the number of processes."""
    return group.size() if group else 1


def is_main(group: mx.distributed.Group | None) -> bool:
    """Return True in the process that writes files and prints."""
    return rank(group) == 0


def group_min(values: Sequence[float], group: mx.distributed.Group | None) -> list[float]:
    """Return the minimum of each value over all processes."""
    if group is None:
        return list(values)
    gathered = mx.distributed.all_gather(mx.array([values], mx.float32), group=group)  # (processes, values)
    return [float(value) for value in np.array(gathered).min(axis=0)]


@contextmanager
def report_lost_peers(group: mx.distributed.Group | None) -> Iterator[None]:
    """Raise ``MLXGPTError`` if the connection to the other processes is lost in the context."""
    try:
        yield
    except RuntimeError as error:
        if group is None:
            raise
        raise MLXGPTError(f"this process lost the other processes of its group ({error}); see their output") from error


def check_in_main(group: mx.distributed.Group | None, check: Callable[[], T]) -> T | None:
    """Return ``check()`` of the main process, None in the others. If it raises ``MLXGPTError``, all processes do."""
    failure: MLXGPTError | None = None
    result: T | None = None
    if is_main(group):
        try:
            result = check()
        except MLXGPTError as error:
            failure = error
    failed = group is not None and mx.distributed.all_sum(mx.array(int(failure is not None)), group=group).item()
    if failure:
        raise failure
    if failed:
        raise MLXGPTError("the first process cannot start; see its output")
    return result


@contextmanager
def main_first(group: mx.distributed.Group | None) -> Iterator[None]:
    """Run the context in the main process first, then in the others, since it may fill a cache that they share."""
    if group and not is_main(group):
        _barrier(group)
    yield
    if group and is_main(group):
        _barrier(group)


def _barrier(group: mx.distributed.Group) -> None:
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
