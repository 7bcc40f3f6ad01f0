"""Which gradients an update is made of: of all rows of its batch, as their mean, and of no step before it."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.data.evidence import Batch
from mlx_gpt.check.doctor.forward.probes import others
from mlx_gpt.check.doctor.optimisation.evidence import (
    STEP,
    Parameters,
    first_steps,
    floating,
    fresh_step,
    given_gradient,
    own_parameters,
    train_batch,
    update_of,
)


@check("accumulation-differs", *STEP, "new_step", explains=("learning-rate-too-high", "cannot-memorise-a-batch"))
def accumulation_differs(case: Case) -> Found:
    """A step is not that of its batch's mean loss: parts are not divided, or earlier gradients are still there.

    Four measures of the first update of a fresh optimizer, of the mean of six with dropout. A row of the batch without
    any effect on it, while another has one (exact, without dropout). Every row given twice: an update of twice the
    length (within 0.2; with dropout 0.4) in the same direction (healthy: 1.00, within 1e-3 without dropout). An update
    of a whole multiple, 2 and more, of learning rate times gradient, as gradient descent without momentum has it
    (within 1 %, residual below 2 %; with dropout 3 and more within 8 %). And the updates of two batches,
    one after the other: see ``left_over`` and ``carried_over``.
    """
    x, y = case.once(train_batch)
    base = case.once(first_steps).updates[0]
    if not any(update.any() for update in base.values()):
        return None
    again = update_of(case, x, y)
    if all(np.array_equal(again[name], base[name]) for name in base):
        calls = 1
        if found := row_ignored(case, x, y, base):
            return found
    else:
        calls = 6
        if found := left_over(case, x, y):
            return found
        base = mean_update(case, x, y, calls)
    found = longer_for_twice(case, x, y, base, calls) or multiple_of_gradient(case, base, calls)
    return found or carried_over(case, x, y, exact=calls == 1)


def mean_update(case: Case, x: np.ndarray, y: np.ndarray, calls: int) -> Parameters:
    updates = [update_of(case, x, y) for _ in range(calls)]
    return {name: np.mean([update[name] for update in updates], axis=0) for name in updates[0]}


def row_ignored(case: Case, x: np.ndarray, y: np.ndarray, base: Parameters) -> Found:
    B = len(x)
    without_effect = {}
    for row in sorted({0, B - 1}) if B > 1 else ():
        x_new, y_new = x.copy(), y.copy()
        x_new[row], y_new[row] = others(case, x[row]), others(case, np.maximum(y[row], 0))
        update = update_of(case, x_new, y_new)
        without_effect[row] = all(np.array_equal(update[name], base[name]) for name in base)
    ignored = [row for row, none in without_effect.items() if none]
    if not ignored or len(ignored) == len(without_effect):
        return None
    return {
        "measured": ignored,
        "expected": [],
        "why": f"row {ignored[0]} of {B} has no effect on the update: other ids in it leave it the same to the bit",
        "remedy": "add up the gradients of all micro-batches, and clear them after the update only",
        "evidence": {"rows_tried": list(without_effect)},
    }


def longer_for_twice(case: Case, x: np.ndarray, y: np.ndarray, base: Parameters, calls: int) -> Found:
    with suppress(CallFailed):  # a step for one shape
        ratio, residual = along(mean_update(case, np.concatenate([x, x]), np.concatenate([y, y]), calls), base)
        if abs(ratio - 2) < (0.2 if calls == 1 else 0.4) and residual < (0.2 if calls == 1 else 1.0):
            return {
                "measured": ratio,
                "expected": 1.0,
                "why": f"with every row given twice the update is {ratio:.3g} times as long; a mean would not change",
                "remedy": "divide the accumulated gradient by the number of micro-batches, weighted by their targets",
                "evidence": {"residual": residual},
            }
    return None


def multiple_of_gradient(case: Case, base: Parameters, calls: int) -> Found:
    if not case.has("gradient", "learning_rate"):
        return None
    grads = case.once(given_gradient)
    rate = float(case.given["learning_rate"])
    shared = {name: base[name] for name in base if name in grads and base[name].any()}
    ratio, residual = along(shared, {name: -rate * grads[name] for name in shared})
    close, fewest, rest = (0.01, 2, 0.02) if calls == 1 else (0.08, 3, 0.4)
    if (
        not np.isfinite(ratio)
        or round(ratio) < fewest
        or abs(ratio / round(ratio) - 1) > close
        or residual > rest * ratio
    ):
        return None
    return {
        "measured": ratio,
        "expected": 1.0,
        "why": f"the update is {ratio:.4g} times learning rate times gradient: a sum over {round(ratio)} micro-batches",
        "remedy": "divide the accumulated gradient by the number of micro-batches, weighted by their targets",
        "evidence": {"residual": residual},
    }


def along(update: Parameters, base: Parameters) -> tuple[float, float]:
    """Return the multiple of ``base`` that is nearest to ``update``, and the size of the rest relative to ``base``."""
    one = np.concatenate([update[name].ravel() for name in base]).astype(np.float64)
    two = np.concatenate([base[name].ravel() for name in base]).astype(np.float64)
    square = float(two @ two)
    if not square:
        return 0.0, np.inf
    ratio = float(one @ two) / square
    return ratio, float(np.linalg.norm(one - ratio * two)) / square**0.5


def halves(x: np.ndarray, y: np.ndarray) -> tuple[Batch, Batch]:
    """Return two batches of the shape of one: the first half of its rows twice, and the second."""
    n = len(x) // 2
    rows = np.arange(len(x)) % n
    return (x[rows], y[rows]), (x[rows + n], y[rows + n])


def update_after(case: Case, earlier: Batch, batch: Batch, steps: int, fresh: bool) -> Parameters:
    """Return the update of a batch after steps on another, from the same parameters; by a fresh optimizer or not."""
    with case.parameters_restored():
        before, step = case.once(own_parameters), fresh_step(case)
        for _ in range(steps):
            step(*earlier)
            case.load(before)
        (fresh_step(case) if fresh else step)(*batch)
        now = floating(case.arrays("parameters"))
    return {name: now[name] - before[name] for name in before if name in now}


def left_over(case: Case, x: np.ndarray, y: np.ndarray) -> Found:
    """Compare the first update of a fresh optimizer after steps on other rows with that after steps on the same.

    Their distance over that of two updates after steps on the same: 0.97 to 1.05 healthy, with dropout; 4 to 13 where
    gradients are left over (Adam, Lion and descent, two sizes, before and after training).
    """
    if len(x) < 2:
        return None
    other, batch = halves(x, y)
    after_other = update_after(case, other, batch, 3, fresh=True)
    after_same, again = (update_after(case, batch, batch, n, fresh=True) for n in (12, 0))
    measured, noise = apart(after_other, after_same), apart(after_same, again)
    if not (measured >= 0.2 and measured >= 3 * noise):  # nor NaN
        return None
    what = "a fresh optimizer's first update of a batch differs with the batches of steps before it"
    return added_up(measured, noise, what)


def carried_over(case: Case, x: np.ndarray, y: np.ndarray, exact: bool) -> Found:
    """Compare the second update, on other rows, with the first on either.

    Momentum gives an earlier gradient less weight than the present one. Elements whose updates on two batches have
    opposite signs therefore follow the earlier in less than half of the cases, over both orders of the batches: a sum
    of at most 0.996 (Adam with beta1 to 0.99, Muon, Lion, momentum to 0.99), of 1.18 and more where gradients add up;
    threshold 1.1. Without momentum and dropout the update is the sum of both, with equal weights within 0.2 %.
    """
    if len(x) < 2:
        return None
    batches = halves(x, y)
    own = np.stack([flat(update_of(case, *batch)) for batch in batches])
    later = np.stack([flat(update_after(case, *pair, 1, fresh=False)) for pair in (batches, batches[::-1])])
    opposite = own[0] * own[1] < 0
    if not (opposite.any() and np.isfinite(own).all() and np.isfinite(later).all()):
        return None
    share = float((later * own > 0)[:, opposite].mean(axis=1).sum())
    if share > 1.1:
        what = f"of the signs in which the updates of two batches differ, {share / 2:.0%} follow the earlier batch"
        return added_up(share / 2, 0.5, what)
    weights = np.linalg.lstsq(own.T, later[0], rcond=None)[0]
    rest = np.linalg.norm(later[0] - weights @ own) / np.linalg.norm(later[0])
    if not (exact and rest <= 0.05 and abs(weights[0] / weights[1] - 1) <= 0.002):  # nor NaN
        return None
    return added_up(float(weights[0] / weights[1]), 0, "the second update is the sum of those of both batches shown")


def added_up(measured: float, expected: float, what: str) -> Found:
    return {
        "measured": measured,
        "expected": expected,
        "why": f"{what}: gradients add up from step to step",
        "remedy": "clear the gradients before each backward pass: optimizer.zero_grad(), or new sums for each update",
        "evidence": {},
    }


def flat(update: Parameters) -> np.ndarray:
    return np.concatenate([part.ravel() for part in update.values()]).astype(np.float64)


def apart(one: Parameters, two: Parameters) -> float:
    """Return the distance of two updates relative to the longer one."""
    a, b = flat(one), flat(two)
    return float(np.linalg.norm(a - b) / (max(np.linalg.norm(a), np.linalg.norm(b)) or 1))
