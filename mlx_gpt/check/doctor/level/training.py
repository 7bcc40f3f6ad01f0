"""Training that ended too early or went on for too long, by its losses."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import batches
from mlx_gpt.check.doctor.level.loss import (
    COUNTED,
    MEASURED,
    Ladder,
    anywhere,
    ladder,
    ladder_on,
    training_loss,
    validation_loss,
)
from mlx_gpt.check.doctor.level.metrics import Rows, curve, metrics

PER_PARAMETER = 20  # tokens (Hoffmann et al. 2022)
# Margins by tests/benchmarks/doctor_level.py, two sizes and two seeds.
FALL = 0.05  # in the last doubling of the steps, of the distance to ln V; runs ended early: 0.15 to 0.26
RISE = 0.05  # of the validation loss above its lowest; on much text at most 0.02, on 2000 tokens up to 0.08
GAP = 0.3  # of validation and training loss, of the former; on much text 0.01, on 2000 tokens 0.23 to 0.72
WRONG_TRAINING = (  # which explains the level of a loss
    "ids-wrapped",
    "targets-not-shifted",
    "targets-shifted-twice",
    "same-batch-again",
    "optimisation",
)


@check("undertrained", "val_ids|metrics", explained_by=WRONG_TRAINING)
def undertrained(case: Case) -> Found:
    """The text is gibberish since training has only begun: the loss is above a trigram model's, or still falls.

    A warning if the loss on ``val_ids`` is above a trigram model's by 2 % of the distance between that and ln V, and
    three standard errors. Or if the loss in ``metrics`` fell in the last doubling of the steps by more than a twentieth
    of its distance from ln V, as it does with less than two tokens per parameter (Hoffmann et al. 2022, equation 10).
    How many more tokens are needed is estimated from that fall, or by 20 tokens per parameter.

    Also if the rows of ``batches`` are shorter than the context, and the loss at the positions that they do not reach
    is above that at the others by a tenth of a nat and four standard errors.
    """
    if case.has("val_ids", "batches") and (found := untrained_positions(case)):
        return found
    rows = case.once(metrics)
    rungs = case.once(ladder) if case.has("val_ids") else None
    loss = case.once(validation_loss) if rungs else None
    n_parameters = sum(array.size for array in case.arrays("parameters").values()) if case.has("parameters") else 0
    per_step = tokens_per_step(case)
    if rungs and loss and (finding := above_counting(rows, rungs, loss.mean, loss.error, n_parameters, per_step)):
        return finding
    return still_falling(rows, log(case.vocab_size), n_parameters, per_step)


def untrained_positions(case: Case) -> Found:
    """Return the finding if no row of the batches reaches the later positions, and the loss is higher there."""
    losses = case.once(anywhere).losses
    T = max(x.shape[1] for x, _ in case.once(batches))
    if losses.shape[1] <= T or len(losses) < 4:
        return None
    rises = np.nanmean(losses[:, T:], axis=1) - np.nanmean(losses[:, :T], axis=1)
    if rises.mean() <= max(0.1, 4 * rises.std(ddof=1) / len(rises) ** 0.5):
        return None
    early, late = float(np.nanmean(losses[:, :T])), float(np.nanmean(losses[:, T:]))
    return {
        "measured": late,
        "expected": early,
        "why": f"positions from {T} on were never trained, since batches have rows of {T} tokens: the loss there is "
        f"{late:.2f}, before them {early:.2f}",
        "remedy": f"train on rows of n_positions = {case.n_positions} tokens, or generate with a context of {T}",
        "evidence": {"trained_positions": T},
    }


def tokens_per_step(case: Case) -> float:
    """Return the number of tokens in the first batch; 0 where it is unknown."""
    return float(case.once(batches)[0][0].size) if case.has("batches", "metrics") else 0.0


def above_counting(
    rows: Rows, rungs: Ladder, loss: float, error: float, n_parameters: int = 0, per_step: float = 0.0
) -> Found:
    """Return the finding for a loss above the lowest of the n-gram models'."""
    lowest = min(rungs.losses.values())
    if loss <= lowest + 0.02 * (rungs.losses["chance"] - lowest) + 3 * error + 0.01:
        return None
    fall, logged = falling(*curve_of(rows)), curve(rows, "val_loss")[1]
    more = missing(
        min(loss, *logged) - lowest if len(logged) else loss - lowest, fall, tokens_seen(rows, per_step), n_parameters
    )
    return finding(loss, lowest, f"the loss of {loss:.2f} is above that of n-gram models ({rungs})", more, fall)


def still_falling(rows: Rows, chance: float, n_parameters: int = 0, per_step: float = 0.0) -> Found:
    """Return the finding for a loss that still fell at the end, with less than 20 tokens seen per parameter."""
    (steps, values), seen = curve_of(rows), tokens_seen(rows, per_step)
    if not len(values) or (n_parameters and seen >= PER_PARAMETER * n_parameters):
        return None
    fall, limit = falling(steps, values), FALL * max(0.0, chance - float(values[-1]))
    if fall <= limit:
        return None
    why = f"the loss still fell by {fall:.2f} in the last doubling of the steps"
    return finding(fall, limit, why, missing(0.0, fall, seen, n_parameters), fall)


def curve_of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and validation losses; training losses where there are few of them."""
    rows_of_val = curve(rows, "val_loss")
    return rows_of_val if len(rows_of_val[0]) >= 4 else curve(rows, "loss")


def finding(measured: float, expected: float, why: str, more: float, fall: float) -> dict[str, Any]:
    how_many = f"about {rounded(more)} more tokens" if more else "more tokens"
    return {
        "measured": measured,
        "expected": expected,
        "why": f"{why}: {how_many} are needed",
        "remedy": f"train longer, on {how_many}",
        "evidence": {"more_tokens": more, "fall_per_doubling": fall},
    }


def falling(steps: np.ndarray, values: np.ndarray) -> float:
    """Return how much the loss fell in the last doubling of the steps, by least squares over their logarithm."""
    last = (steps > 0) & (steps >= steps[-1:].sum() / 2)
    x, y = np.log2(np.where(last, steps, 1))[last], values[last]
    if len(x) < 3 or np.ptp(x) < 0.5:
        return 0.0
    return float(-np.polyfit(x, y, 1)[0])


def tokens_seen(rows: Rows, per_step: float) -> float:
    """Return the tokens seen by the last row; 0 where that is unknown."""
    last: dict[str, float] = rows[-1] if rows else {}
    return last.get("tokens", last.get("step", 0.0) * per_step)


def missing(distance: float, fall: float, seen: float, n_parameters: int) -> float:
    """Return how many more tokens lower the loss by ``distance`` at its present fall per doubling.

    At least as many as were seen, and at most 20 per parameter in all, which is also the number where the fall is
    unknown; 0 where nothing is known.
    """
    enough = max(PER_PARAMETER * n_parameters - seen, seen)
    if not seen or fall <= 0:
        return enough
    by_fall = seen * (exp(min(distance / fall, 20.0) * log(2)) - 1)
    return min(max(by_fall, seen), enough) if n_parameters else max(by_fall, seen)


def rounded(n: float) -> str:
    """Return a number with two digits: 4,100,000 as 4.1M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= 0.95 * size:
            return f"{n / size:.2g}{unit}" if n < 99.5 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


@check(
    "overfitted",
    "val_ids|metrics",
    explains=("undertrained",),
    explained_by=("validation-in-training", "same-batch-again", "corpus-repeats"),
)
def overfitted(case: Case) -> Found:
    """The model has memorised its training text: the validation loss rises, or is far above the training loss.

    A warning if the last validation loss in ``metrics`` is above the lowest by a twentieth, while the training loss
    fell. Or if the loss on ``train_ids`` is below that on ``val_ids`` by 30 % of the latter and six standard errors,
    after subtracting the difference of both texts for a bigram model; the published character model of tiny Shakespeare
    has 25 % at its best step.
    """
    if finding := risen(case.once(metrics)):
        return finding
    if not case.has("val_ids", "train_ids"):
        if case.given.get("metrics"):
            return None
        raise NotApplicable("train_ids and val_ids, or metrics")
    val, train, rungs = case.once(validation_loss), case.once(training_loss), case.once(ladder)
    harder = max(0.0, rungs.losses["bigram"] - rungs.kin["bigram"])
    gap, error = val.mean - train.mean - harder, (val.error**2 + train.error**2) ** 0.5
    if gap <= max(GAP * val.mean, 6 * error, 0.05):
        return None
    return too_long(
        val.mean, train.mean, f"the loss is {train.mean:.2f} on training text and {val.mean:.2f} on validation text"
    )


def risen(rows: Rows) -> Found:
    """Return the finding for a validation loss that has risen while the training loss fell."""
    steps, values = curve(rows, "val_loss")
    train_steps, train = curve(rows, "loss")
    if len(values) < 3:
        return None
    best = int(values.argmin())
    last, lowest = float(np.median(values[best:][-3:])), float(values[best])
    if best == len(values) - 1 or last <= lowest * (1 + RISE) or values[-1] <= lowest * (1 + RISE):
        return None
    before, after = (near(train_steps, train, step) for step in (steps[best], steps[-1]))
    if before is not None and after is not None and after >= before:
        return None
    why = f"the validation loss rose from {lowest:.2f} at step {steps[best]:.0f} to {values[-1]:.2f}"
    return too_long(float(values[-1]), lowest, why)


def near(steps: np.ndarray, values: np.ndarray, step: float) -> float | None:
    """Return the mean of the last ten values up to a step."""
    until = values[steps <= step][-10:]
    return float(until.mean()) if len(until) else None


def too_long(measured: float, expected: float, why: str) -> dict[str, Any]:
    return {
        "measured": measured,
        "expected": expected,
        "why": why,
        "remedy": "keep the model with the lowest validation loss; use more text, dropout, or a smaller model",
        "evidence": {},
    }


def last_line(rows: Rows, train: np.ndarray, val: np.ndarray, V: int, loss: float, n_parameters: int) -> str:
    """Return one line on a run that ended too early or went on for too long, or "". ``train``, ``val``: ids."""
    rungs = ladder_on(train[:COUNTED], val[:MEASURED], V) if len(train) >= 64 and len(val) >= 64 else None
    too_early = rungs and above_counting(rows, rungs, loss, 0.0, n_parameters)
    for code, finding in (
        ("overfitted", risen(rows)),
        ("undertrained", too_early or still_falling(rows, log(V), n_parameters)),
    ):
        if finding:
            return f"{code}: {finding['why']}"
    return ""
