"""Forty steps of a fresh optimizer on one batch: too large, too small, or without memorising the batch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse, rms
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import Batch
from mlx_gpt.check.doctor.optimisation.evidence import (
    STEP,
    Parameters,
    cross_entropy,
    first_steps,
    own_parameters,
    train_batch,
    untrained,
)
from mlx_gpt.check.doctor.optimisation.fresh import fresh_step

STEPS, FEWEST = 40, 20
DECAY = 0.02  # of the weights that an update removes; healthy: 0.003 and less
TOWARDS_ZERO = 0.3  # cosine of an update with the direction to zero, from which it is a decay
ROUNDING = 2e-6  # of a cross-entropy
SHARE = 1 / 20  # of the time that is left, for the steps


@dataclass(frozen=True)
class Run:
    """Steps on one batch: the losses that they return, and the cross-entropy before and after.

    ``first``, ``last``, ``moved``: the size of the first update, of the last, and of all together, relative to the
    weights, the median over matrices.
    """

    losses: np.ndarray
    before: float
    after: float
    first: float
    last: float
    moved: float

    @property
    def progress(self) -> float:
        return (self.before - self.after) / self.before if np.isfinite(self.after) else -np.inf


def run_on(case: Case, batch: Batch) -> Run:
    case.once(first_steps)  # needs the first calls of a step without new_step
    x, y = batch
    with case.parameters_restored():
        start = then = case.once(own_parameters)
        before, step = cross_entropy(case, x, y), fresh_step(case)
        losses: list[float] = []
        end = time.monotonic() + SHARE * case.seconds_left()
        while len(losses) < STEPS - 1 and (len(losses) < 5 or time.monotonic() < end):
            losses.append(step(x, y))
            then = case.arrays("parameters") if len(losses) == 1 else then
            if len(losses) >= FEWEST and losses[-1] < 0.95 * losses[0]:
                break  # it learns
        ahead = case.arrays("parameters")
        losses.append(step(x, y))
        final = case.arrays("parameters")
        after = cross_entropy(case, x, y)
    return Run(
        np.array(losses), before, after, change(start, then), change(ahead, final, start), change(start, final)
    )  # fmt: skip


def change(before: Parameters, after: Parameters, weights: Parameters | None = None) -> float:
    """Return the size of a change relative to the weights, by default those before: the median over matrices."""
    weights = weights or before
    sizes = [
        rms(after[name] - before[name]) / rms(value) for name, value in weights.items() if value.ndim > 1 and rms(value)
    ]
    return float(np.median(sizes)) if sizes else 0.0


def real_run(case: Case) -> Run:
    """Make steps on a batch of the user's data, where it is given."""
    return run_on(case, case.once(train_batch))


def random_run(case: Case) -> Run:
    """Make steps on random ids, which can only be memorised."""
    x, _ = case.once(train_batch)
    return run_on(case, (case.ids(*x.shape), case.ids(*x.shape)))


def goes_down(case: Case) -> bool:
    """Return True if a hundredth, or less, of the first update that is not zero lowers the batch's cross-entropy."""
    x, y = case.once(train_batch)
    steps = case.once(first_steps)
    update = next((each for each in steps.updates if any(part.any() for part in each.values())), steps.updates[0])
    with case.parameters_restored():
        before = cross_entropy(case, x, y)
        for part in (1e-2, 1e-3, 1e-4):
            case.load({name: value + np.float32(part) * update.get(name, 0) for name, value in steps.before.items()})
            if cross_entropy(case, x, y) < before * (1 - ROUNDING):
                return True
    return False


def decayed(case: Case) -> float:
    """Return the share of the matrices' size that the first update removes, 0 unless it points towards zero.

    The median cosine with that direction is within 0.05 for updates without a strong decay, at any learning rate; for a
    weight decay of 10 in trained models it is 0.33 and more, for one of 30 in others 0.5.
    """
    update, before = case.once(first_steps).updates[0], case.once(first_steps).before
    pairs = [(update[name], value) for name, value in before.items() if value.ndim > 1 and name in update]
    sizes = [(rms(step), rms(weights), float(np.mean(step * weights, dtype=np.float64))) for step, weights in pairs]
    sizes = [size for size in sizes if size[0] and size[1]]
    towards_zero = sizes and np.median([-product / (step * weights) for step, weights, product in sizes]) > TOWARDS_ZERO
    return float(np.median([-product / weights**2 for _, weights, product in sizes])) if towards_zero else 0.0


@check("learning-rate-too-high", *STEP, explains=("cannot-memorise-a-batch",))
def learning_rate_too_high(case: Case) -> Found:
    """Training raises the loss instead of lowering it, since each step is too large.

    A fault if, in forty steps on one batch, its loss rises by 0.3 nats and to 0.9 ln V, or is not finite, though a
    hundredth of the first update lowers it. At healthy learning rates it does not rise (Adam at 1e-5 to 1e-2, Muon,
    Lion, gradient descent up to 0.1; three sizes, before and after training); Adam at 0.1 raises it by 0.6 nats and
    more, at 1 by 30.
    """
    run = case.once(real_run)
    scale = run.before / run.losses[0] if run.losses[0] > 0 else 1.0
    top = float(np.nan_to_num([*run.losses * scale, run.after], nan=np.inf).max())
    if not np.isfinite(run.before) or top < max(run.before + 0.3, 0.9 * np.log(case.vocab_size)):
        return None
    if case.once(decayed) > DECAY or not case.once(goes_down):
        return None
    return {
        "measured": top,
        "expected": run.before,
        "why": f"{len(run.losses)} steps on a batch raise its loss from {run.before:.3g} to {top:.3g} nats; 1/100 "
        f"of the first update lowers it, and the whole update is {run.first:.2g} of the weights' size",
        "remedy": "divide the learning rate by 10 until the loss on one batch falls (Adam on small GPTs: 3e-4 to 3e-3)",
        "evidence": {"losses": run.losses.tolist(), "update_to_weight": run.first},
    }


@check("learning-rate-too-low", *STEP, explains=("cannot-memorise-a-batch",))
def learning_rate_too_low(case: Case) -> Found:
    """Training makes no progress, since each step is tiny.

    A fault if forty steps on one batch change its loss by less than 0.5 %, with updates below 5e-5 of the weights'
    size, in an untrained model, one whose norm weights are all exactly 1; in others by less than 0.1 %, with updates
    below 1e-6. Healthy updates have 1e-3 to 1e-1 of the weights' size (Adam at 1e-4 and above), or 5e-4 (Adam at 1e-5).
    Updates that grow by half in these steps are a warmup, and no fault.
    """
    run = case.once(real_run)
    fresh = case.once(untrained)
    most_moved, most_progress = (5e-5, 0.005) if fresh else (1e-6, 0.001)
    rate = float(case.given.get("learning_rate", 0))
    peak = max((float(row.get("learning_rate") or 0) for row in case.given.get("metrics", ())), default=0)
    if len(run.losses) < FEWEST or run.last > 1.5 * run.first or run.before < 0.3 or peak > 10 * rate:
        return None
    if not 0 < run.last < most_moved or abs(run.progress) > most_progress or case.once(decayed) > DECAY:
        return None
    return {
        "measured": run.last,
        "expected": "1e-4 to 1e-1",
        "why": f"an update is {run.last:.2g} of the weights' size; {len(run.losses)} of them take the loss on one "
        f"batch from {run.before:.5g} to {run.after:.5g}",
        "remedy": "raise the learning rate tenfold until the loss falls (Adam on small GPTs: 3e-4 to 3e-3)",
        "evidence": {"losses": run.losses.tolist(), "moved": run.moved},
    }


@check("cannot-memorise-a-batch", *STEP)
def cannot_memorise_a_batch(case: Case) -> Found:
    """The loss on one batch, shown again and again, does not fall, though the weights move.

    Forty steps are made on a batch of the data, and on one of random ids. A fault if the cross-entropy has not fallen
    although the weights have moved by 0.01 of their size, or if it has fallen by less than 0.5 % and they have moved by
    0.3; by less than 3 % if the first update removes 2 % of the weights, as too strong a weight decay does. Healthy: 4
    % and more where the weights have moved by 0.3.
    """
    tried = [(name, case.once(make)) for name, make in (("a batch of the data", real_run), ("random ids", random_run))]
    if all(len(run.losses) < FEWEST for _, run in tried):
        raise NotApplicable("a faster step")
    least = 0.03 if case.once(decayed) > DECAY else 0.005
    for name, run in tried:
        stuck = (run.progress <= 0 and not run.moved <= 0.01) or (run.progress < least and run.moved > 0.3)
        if len(run.losses) < FEWEST or run.before < 0.3 or not stuck:
            continue
        if not np.isfinite(run.after) and all(map(coarse, case.once(own_parameters).values())):
            raise NotApplicable("parameters in float32")
        down, share = case.once(goes_down), case.once(decayed)
        reason = ""
        if share > DECAY:
            reason = f"; each update takes {share:.0%} of the weights away: a decay"
        elif not down:
            reason = "; a hundredth of the first update raises it too: no learning rate helps"
        return {
            "measured": run.after,
            "expected": f"well below {run.before:.3g}",
            "why": f"{len(run.losses)} steps on {name} move the weights by {run.moved:.2g} of their size, and its "
            f"cross-entropy goes from {run.before:.4g} to {run.after:.4g}{reason}",
            "remedy": "check that the step uses the batch it is given, subtracts the gradient, clears it after each "
            "step, and decays weights by learning rate times 0.1 or less",
            "evidence": {"losses": run.losses.tolist(), "first_update_lowers_the_loss": down, "decay": share},
        }
    return None
