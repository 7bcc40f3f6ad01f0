"""Updates to compare with each other, made with the same seed, so that dropout is the same in each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlx_gpt.check.doctor.arrays import rms
from mlx_gpt.check.doctor.calls import seeded
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.data.evidence import Batch
from mlx_gpt.check.doctor.optimisation.evidence import (
    Parameters,
    cross_entropy,
    floating,
    own_parameters,
    train_batch,
)
from mlx_gpt.check.doctor.optimisation.fresh import fresh_step

MOST_NUMBERS = 2**22  # of an update that are compared


def updates_of(case: Case, *batches: Batch, seed: int = 0) -> Iterator[Parameters]:
    """Yield what one fresh optimizer adds to the parameters for each batch; these are put back after each step."""
    with case.parameters_restored():
        before, step = case.once(own_parameters), fresh_step(case)
        for batch in batches:
            with seeded(seed):
                step(*batch)
            now = floating(case.arrays("parameters"))
            case.load(before)
            yield {name: now[name] - before[name] for name in before if name in now}


def begins_as_loaded(case: Case) -> bool:
    """Return True if a step begins at the parameters that were loaded, with the loss that they have.

    A step does not if it keeps a copy of the parameters, as in float32, or trains a model whose average is examined.
    """
    (x, y), rng = case.once(train_batch), np.random.default_rng(0)
    with case.parameters_restored():
        before, step = case.once(own_parameters), fresh_step(case)
        moved = {
            name: (value + (rms(value) or 0.1) * rng.standard_normal(value.shape)).astype(value.dtype)
            for name, value in before.items()
        }
        losses, costs = [], []
        for values in (before, moved):
            case.load(values)
            costs.append(cross_entropy(case, x, y))
            losses.append(step(x, y))
        now = floating(case.arrays("parameters"))
    loss_changes, cost_changes = (abs(pair[1] / (pair[0] or np.nan) - 1) for pair in (losses, costs))
    same_loss = cost_changes > 0.05 and loss_changes < 0.1 * cost_changes
    return not (same_loss or apart(now, before) < 0.5 * apart(now, moved))


def update_after(case: Case, *batches: Batch, fresh: bool = False, seed: int = 0) -> Parameters:
    """Return the update by the last batch after steps on the others; ``fresh``: the last one by a new optimizer."""
    if not fresh:
        return list(updates_of(case, *batches, seed=seed))[-1]
    for _ in updates_of(case, *batches[:-1]):
        pass
    return update_after(case, batches[-1])


def halves(x: np.ndarray, y: np.ndarray) -> tuple[Batch, Batch]:
    """Return two batches of the same shape: the first half of the rows repeated, and the second half repeated."""
    n = len(x) // 2
    rows = np.arange(len(x)) % n
    return (x[rows], y[rows]), (x[rows + n], y[rows + n])


def are_equal(first: Parameters, second: Parameters) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


def minus(first: Parameters, second: Parameters) -> Parameters:
    return {name: first[name] - second[name] for name in first}


def as_vector(update: Parameters) -> np.ndarray:
    """Return an update as one vector, every k-th number of a large one: (N,) float64."""
    step = 1 + sum(part.size for part in update.values()) // MOST_NUMBERS
    return np.concatenate([part.ravel()[::step] for part in update.values()]).astype(np.float64)


def along(update: Parameters, base: Parameters) -> tuple[float, float]:
    """Return the factor by which ``base`` is nearest to ``update``, and the size of the rest relative to ``base``."""
    first, second = as_vector({name: update[name] for name in base}), as_vector(base)
    square = float(second @ second)
    if not square:
        return 0.0, np.inf
    ratio = float(first @ second) / square
    return ratio, float(np.linalg.norm(first - ratio * second)) / square**0.5


def apart(first: Parameters, second: Parameters) -> float:
    """Return the distance of two updates relative to the longer one."""
    a, b = as_vector(first), as_vector(second)
    return float(np.linalg.norm(a - b) / (max(np.linalg.norm(a), np.linalg.norm(b)) or 1))
