"""Gradient accumulation: an update follows the mean gradient of all rows of its batch, and of no earlier step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse
from mlx_gpt.check.doctor.calls import seeded
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import Batch, batches
from mlx_gpt.check.doctor.optimisation.evidence import (
    STEP,
    Parameters,
    first_steps,
    floating,
    given_gradient,
    gradient_is_taken,
    own_parameters,
    train_batch,
)
from mlx_gpt.check.doctor.optimisation.fresh import is_fresh
from mlx_gpt.check.doctor.optimisation.gradient import own_loss
from mlx_gpt.check.doctor.optimisation.leftover import carried_over, left_over, wiped
from mlx_gpt.check.doctor.optimisation.updates import along, are_equal, begins_as_loaded, halves, minus, update_after
from mlx_gpt.check.doctor.probes import others

MOST_ROWS, MOST_PARTS = 64, 64  # rows of a probe; micro-batches of a sum that is recognised
IN_TRAINING = ("learning-rate-too-high", "cannot-memorise-a-batch")
DIVIDE = "divide the accumulated gradient by the number of micro-batches, weighted by their targets"
Gradient = Callable[[np.ndarray, np.ndarray], Parameters]  # (x, y) -> the gradient of a batch, or its update


@check("accumulation-differs", "gradient|step|new_step", explains=IN_TRAINING)
def accumulation_differs(case: Case) -> Found:
    """A step does not follow the mean gradient of its batch: parts are lost, summed, or left from earlier steps.

    Both ``gradient`` and the first update of a fresh optimizer are examined. A fault in one of these cases:

    - The first or the last row of a batch has no effect, exactly, or one has 1.2 times the weight of the other.
    - The gradient is 2 or more times, within 2 %, what differences of the loss along it give.
    - The update is twice as long if every row is given twice (within 0.2; healthy: 1.00 times as long).
    - The update is a whole multiple, 2 or more, of learning rate times gradient (within 1 %, residual below 2 %), where
      gradient descent without momentum has 1.
    - The loss that the first step returns is 2 or more times what ``loss`` gives (within 3 %).
    - The update depends on earlier batches: see ``left_over``, ``carried_over`` and ``wiped``.

    All calls have the same seed. Where dropout changes updates even so, means of six are compared, with wider limits.
    """
    return of_gradient(case) or of_step(case)


def of_gradient(case: Case) -> Found:
    if not case.has("gradient") or gradient_is_taken(case):
        return None

    def gradient(x: np.ndarray, y: np.ndarray) -> Parameters:
        with seeded(0):
            return floating(case.arrays("gradient", x.copy(), y.copy()))

    finding = of_mean(case, gradient, 1.0, "the gradient")
    return finding and {**finding, "explains": (*IN_TRAINING, "future-leak-in-gradient")}


def of_step(case: Case) -> Found:
    if missing := next((names for names in STEP if not any(map(case.has, names.split("|")))), None):
        raise NotApplicable(missing)
    if not is_fresh(case):
        raise NotApplicable("new_step")
    if not case.once(begins_as_loaded):
        raise NotApplicable("a step that begins at the loaded parameters")
    x, y = case.once(train_batch)
    pair = halves(x, y) if len(x) > 1 else None
    if not all(any(part.any() for part in update.values()) for update in case.once(first_steps).updates):
        return pair and wiped(case, *pair)
    if pair and (finding := left_over(case, *pair)):
        return finding
    base = update_after(case, (x, y))
    repeats = are_equal(base, update_after(case, (x, y)))
    steady = repeats and are_equal(base, update_after(case, (x, y), seed=1))
    seeds = range(1 if steady else 6)

    def update(x: np.ndarray, y: np.ndarray) -> Parameters:
        updates = [update_after(case, (x, y), seed=seed) for seed in seeds]
        return {name: np.mean([update[name] for update in updates], axis=0) for name in updates[0]}

    finding, rate = None, case.given.get("learning_rate", 0)
    with suppress(CallFailed):  # a step for fewer rows
        finding = of_mean(case, update, -rate, "the update over the learning rate") if repeats else None
    base = base if steady else update(x, y)
    finding = finding or longer_for_twice(update, x, y, base, steady) or (pair and carried_over(case, *pair, repeats))
    return finding or multiple_of_gradient(case, base, steady) or multiple_of_loss(case)


def probe_batch(case: Case) -> Batch:
    """Return random ids of the shape of a batch of the user's.

    All rows have the same targets, in another order, so that an ignored id takes the same weight from each row.
    """
    (B, T), own = case.once(train_batch)[0].shape, case.once(batches)[0][0].shape if case.has("batches") else (0, 0)
    rows = own[0] if own[1] == T and B < own[0] <= MOST_ROWS and not case.one_row else B
    return case.ids(rows, T), case.rng.permuted(np.repeat(case.ids(1, T), rows, axis=0), axis=1)


def of_mean(case: Case, gradient: Gradient, rate: float, what: str) -> Found:
    """Return the finding if rows weigh unequally, or if a gradient is a multiple of differences of the loss.

    ``rate``: by which the gradient is multiplied where it is an update.
    """
    x, y = case.once(probe_batch)
    base = gradient(x, y)
    if not are_equal(base, gradient(x, y)):
        return None
    weights = {row: row_weight(case, gradient, x, y, row, base) for row in {0, len(x) - 1}}
    low, high = (best(weights, key=lambda row: np.nan_to_num(weights[row], nan=1.0)) for best in (min, max))
    if weights[low] == 0 != weights[high]:
        why = f"row {low} of {len(x)} has no effect on {what}: with other ids in this row it is the same bit for bit"
        remedy = "add up the gradients of all micro-batches, and clear them after the update only"
    elif weights[high] > 1.2 * weights[low]:
        why = f"row {high} of {len(x)} weighs {weights[high] / weights[low]:.3g} times as much in {what} as row {low}"
        remedy = "weight each micro-batch by its number of targets: the last one may have fewer rows"
    elif np.isfinite(weights[low] + weights[high]) and (rate == 1 or (rate and len(x) > 1)):  # one row: weight 1
        return multiple_of_difference(case, {name: part / rate for name, part in base.items()}, x, y, what)
    else:
        return None
    return {"measured": weights[low], "expected": 1.0, "why": why, "remedy": remedy, "evidence": {"weights": weights}}


def row_weight(case: Case, gradient: Gradient, x: np.ndarray, y: np.ndarray, row: int, base: Parameters) -> float:
    """Return the weight of a row relative to that in a mean; 0 if replacing the row changes nothing.

    Replacing a row changes a gradient by the weight times the difference of the gradients of both rows, which batches
    of one of them alone give. NaN where the change is no multiple of that, as with the updates of most optimizers.
    """
    new_x, new_y = x.copy(), y.copy()
    new_x[row], new_y[row] = others(case, x[row]), case.rng.permutation(y[row])
    changed = gradient(new_x, new_y)
    if are_equal(base, changed):
        return 0.0
    alone = [
        gradient(np.repeat(a[[row]], len(x), 0), np.repeat(b[[row]], len(x), 0)) for a, b in ((x, y), (new_x, new_y))
    ]
    weight, rest = along(minus(base, changed), minus(*alone))
    return weight * len(x) if rest < 0.01 * weight else np.nan


def multiple_of_difference(case: Case, gradient: Parameters, x: np.ndarray, y: np.ndarray, what: str) -> Found:
    """Return the finding if the gradient is a multiple of differences of the loss along it, without token tables."""
    start = case.once(own_parameters) if case.has("parameters", "load_parameters") else {}
    along = {name: part for name, part in gradient.items() if name in start and case.vocab_size not in part.shape}
    square = sum(float(np.square(part, dtype=np.float64).sum()) for part in along.values())
    if not square or not np.isfinite(square) or all(map(coarse, start.values())):
        return None
    ratios = []
    with case.parameters_restored():
        for size in (0.01, 0.02):  # nats
            values = []
            for h in (size / square, -size / square):
                case.load({**start, **{name: start[name] + np.float32(h) * part for name, part in along.items()}})
                values.append(own_loss(case, x, y))
            ratios.append(2 * size / (values[0] - values[1] or np.nan))
    n = np.round(ratios[0])
    if not (2 <= n <= MOST_PARTS and np.abs(np.array(ratios) / n - 1).max() < 0.02):  # nor NaN
        return None
    return sum_of_parts(ratios[0], what + " is {:.4g} times the difference of the loss along it")


def longer_for_twice(update: Gradient, x: np.ndarray, y: np.ndarray, base: Parameters, steady: bool) -> Found:
    with suppress(CallFailed):  # a step for one shape
        ratio, residual = along(update(np.concatenate([x, x]), np.concatenate([y, y])), base)
        if abs(ratio - 2) < (0.2 if steady else 0.4) and residual < (0.2 if steady else 1.0):
            return {
                "measured": ratio,
                "expected": 1.0,
                "why": f"with every row given twice the update is {ratio:.3g} times as long; a mean would not change",
                "remedy": DIVIDE,
                "evidence": {"residual": residual},
            }
    return None


def multiple_of_gradient(case: Case, base: Parameters, steady: bool) -> Found:
    if not case.has("gradient", "learning_rate"):
        return None
    grads = case.once(given_gradient)
    rate = float(case.given["learning_rate"])
    shared = {name: base[name] for name in base if name in grads and base[name].any()}
    ratio, residual = along(shared, {name: -rate * grads[name] for name in shared})
    close, rest = (0.01, 0.02) if steady else (0.08, 0.4)
    n = np.round(ratio)
    if not (n >= 2 and abs(ratio / n - 1) <= close and residual <= rest * ratio):  # nor NaN
        return None
    if not steady and n == 2:  # or Nesterov momentum, whose first update is 1.9 times the gradient
        raise NotApplicable("a step without dropout")
    return sum_of_parts(ratio, "the update is {:.4g} times learning rate times gradient")


def multiple_of_loss(case: Case) -> Found:
    """Return the finding if the first loss that a step returns is 2 or more times the user's loss, within 3 %.

    An optimizer that divides by the size of the gradient, as Adam, hides such a sum from its updates.
    """
    if not case.has("loss"):  # a step may add terms of its own
        return None
    x, y = case.once(train_batch)
    ratio = case.once(first_steps).losses[0] / (case.number("loss", x.copy(), y.copy()) or np.nan)
    n = np.round(ratio)
    if not (2 <= n <= MOST_PARTS and n <= x.size and abs(ratio / n - 1) < 0.03):  # nor NaN
        return None
    return sum_of_parts(ratio, "the loss that step returns is {:.4g} times that of its batch")


def sum_of_parts(ratio: float, what: str) -> Found:
    return {
        "measured": ratio,
        "expected": 1.0,
        "why": f"{what.format(ratio)}: a sum over {round(ratio)} micro-batches",
        "remedy": DIVIDE,
        "evidence": {},
    }
