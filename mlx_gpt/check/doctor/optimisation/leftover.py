"""Gradients of earlier steps in an update, and micro-batches whose gradients are cleared before the update."""

from __future__ import annotations

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found
from mlx_gpt.check.doctor.data.evidence import Batch
from mlx_gpt.check.doctor.optimisation.evidence import MOST_CALLS, floating
from mlx_gpt.check.doctor.optimisation.fresh import Step, fresh_step
from mlx_gpt.check.doctor.optimisation.updates import apart, are_equal, as_vector, update_after

SHARE = 1.02, 1.1  # of signs that follow the earlier batch, in ``carried_over``: where updates repeat, and elsewhere


def left_over(case: Case, first: Batch, second: Batch) -> Found:
    """Return the finding if the first update of a fresh optimizer depends on the batches of steps before it.

    In a healthy step it does not, exactly. Where dropout does not repeat with a seed, updates after steps on other rows
    are compared with updates after steps on the same rows: their distance over that of two of the latter is 0.97 to
    1.05 in healthy steps, and 4 to 13 with gradients left over (Adam, Lion, gradient descent; two sizes, before and
    after training).
    """
    if not case.has("new_step"):
        return None
    after_other = update_after(case, first, first, first, second, fresh=True)
    if are_equal(after_other, update_after(case, second, fresh=True)):
        return None
    after_same, again = (update_after(case, *[second] * n, second, fresh=True) for n in (12, 0))
    measured, noise = apart(after_other, after_same), apart(after_same, again)
    if not (measured >= 0.2 and measured >= 3 * noise):  # nor NaN
        return None
    what = "a fresh optimizer's first update of a batch differs with the batches of steps before it"
    return added_up(measured, noise, what)


def carried_over(case: Case, first: Batch, second: Batch, repeats: bool) -> Found:
    """Return the finding if an optimizer's second update contains the gradient of the first batch beyond momentum.

    Momentum gives an earlier gradient at most the weight of the present one. So where the updates of two batches have
    opposite signs, the second update has the sign of the earlier batch for one order of the batches at most: the shares
    of both orders sum to at most 1 (measured for Adam, Lion, Muon and momentum: 0.996 and less). Where gradients add
    up they sum to more (Lion 1.04, Adam 1.18 and more). Without momentum the second update is then the sum of the
    updates of both batches, with equal weights within 0.2 %.
    """
    own = np.stack([as_vector(update_after(case, batch)) for batch in (first, second)])
    later = np.stack([as_vector(update_after(case, *pair)) for pair in ((first, second), (second, first))])
    opposite = own[0] * own[1] < 0
    if not (opposite.any() and np.isfinite(own).all() and np.isfinite(later).all()):
        return None
    share = float((later * own > 0)[:, opposite].mean(axis=1).sum())
    if share > SHARE[not repeats]:
        what = f"of the signs in which the updates of two batches differ, {share / 2:.1%} follow the earlier batch"
        return added_up(share / 2, 0.5, what)
    weights = np.linalg.lstsq(own.T, later[0], rcond=None)[0]
    rest = np.linalg.norm(later[0] - weights @ own) / np.linalg.norm(later[0])
    if not (repeats and rest <= 0.05 and abs(weights[0] / weights[1] - 1) <= 0.002):  # nor NaN
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


def wiped(case: Case, first: Batch, second: Batch) -> Found:
    """Return the finding if a step that moves the parameters at every n-th call uses the last batch only.

    Its update is then exactly the same with other batches before the last: each call clears the gradients before it.
    """
    with case.parameters_restored():
        step = fresh_step(case)
        calls = [calls_to_move(case, step, first) for _ in range(3)]
    n = calls[1]
    if n < 2 or n != calls[2]:  # a learning rate of 0 at first
        return None
    same, other, last = (
        update_after(case, *[earlier] * (n - 1), batch)
        for earlier, batch in ((first, first), (second, first), (first, second))
    )
    if not are_equal(same, other) or are_equal(same, last):
        return None
    return {
        "measured": 1,
        "expected": n,
        "why": f"parameters move at every call {n} of step, by the gradient of the last batch alone: other batches "
        "before it leave the update the same to the bit",
        "remedy": "clear the gradients after the update only, not before each backward pass",
        "evidence": {"calls": n},
    }


def calls_to_move(case: Case, step: Step, batch: Batch) -> int:
    """Return the number of calls until parameters move, 0 if none of ``MOST_CALLS`` moves them."""
    before = floating(case.arrays("parameters"))
    for n in range(1, MOST_CALLS + 1):
        step(*batch)
        if not are_equal(before, floating(case.arrays("parameters"))):
            return n
    return 0
