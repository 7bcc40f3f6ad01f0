"""Compare the user's loss with the cross-entropy of forward's logits, for chosen targets."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.data.evidence import decoded, train_ids
from mlx_gpt.check.doctor.data.targets import loss_shift
from mlx_gpt.check.doctor.optimisation.evidence import at_targets, negative_logprobs, probe_rows, train_batch
from mlx_gpt.check.doctor.optimisation.loss_probes import (
    MOVED,
    UNITS,
    Line,
    lines,
    loss_probes,
    moved_targets,
    normal,
    unit_of,
)
from mlx_gpt.check.doctor.probes import probe_length

ORDINARY = 0.01  # of the training ids; an id that is more of them, beside others, is no padding
IN_TRAINING = ("learning-rate-too-high", "learning-rate-too-low", "cannot-memorise-a-batch")
BY_DENOMINATOR = ("initial-loss-off", "reported-loss-differs", "accumulation-differs", *IN_TRAINING)


def normalisation(case: Case, by_shape: list[Line]) -> str | None:
    """Return what the loss is in place of the mean, if its slopes at both shapes tell; else None."""
    V = case.vocab_size
    for name, factor in {
        "the sum over all positions": lambda B, T: B * T,
        "a sum over positions, a mean over rows only": lambda B, T: T,
        "a sum over rows, a mean over positions only": lambda B, T: B,
        "the mean over the vocabulary too": lambda B, T: 1 / V,
    }.items():
        shift = case.once(loss_shift)
        sizes = np.array([factor(p.y.shape[1], p.y.shape[2] - shift) for p in case.once(loss_probes)])
        slopes = np.array([line.slope for line in by_shape])
        fits = any(np.allclose(slopes, unit * sizes, rtol=0.01) for unit in UNITS.values())
        if fits and not np.allclose(sizes, 1) and all(line.through_zero for line in by_shape):
            return name
    return None


def position_weights(case: Case) -> np.ndarray | None:
    """Return the weight of each position's cross-entropy in the loss, (B, T); None if equal, or not linear in them."""
    B, T, shift = probe_rows(case, 2), min(probe_length(case), 6), case.once(loss_shift)
    x = case.ids(B, T)
    costs = negative_logprobs(case.logits(x))
    order = np.argsort(costs, axis=-1)
    levels = [order[..., int(q * (case.vocab_size - 1))].astype(np.int32) for q in (0, 0.5, 1)]
    chosen = [np.take_along_axis(costs, level[..., None], axis=-1)[..., 0] for level in levels]
    base = case.number("loss", x, np.roll(levels[0], shift, axis=1))
    weights = np.zeros((B, T))
    for b in range(B):
        for t in range(T - shift):
            slopes = []
            for level, cost in zip(levels[1:], chosen[1:], strict=True):
                y = levels[0].copy()
                y[b, t] = level[b, t]
                change = case.number("loss", x, np.roll(y, shift, axis=1)) - base
                if cost[b, t] > chosen[0][b, t]:
                    slopes.append(change / (cost[b, t] - chosen[0][b, t]))
            if not slopes or np.ptp(slopes) > 0.02 * np.abs(slopes).max() + 1e-4:
                return None
            weights[b, t] = slopes[-1]
    pair = [targets.astype(np.int32) for targets in moved_targets(costs)]
    first, second = (np.take_along_axis(costs, y[..., None], axis=-1)[..., 0] for y in pair)
    before, after = (case.number("loss", x, np.roll(y, shift, axis=1)) for y in pair)
    expected = float((weights * (second - first)).sum())
    if abs(after - before - expected) > MOVED * abs(expected) + 1e-3 * abs(base):
        return None
    unequal = weights[:, : T - shift].max() > 1.05 * weights[:, : T - shift].min()
    return weights if unequal and weights.sum() > 0 and weights.min() > -1e-3 else None


def ignored_token(case: Case) -> tuple[int, float] | None:
    """Return an id of the text whose targets the loss ignores, and its share of the training ids.

    Padding stands in runs: only ids count that differ from both neighbours in more than 1 % of the places. With such an
    id as all targets but one, the loss is the cross-entropy of that one.
    """
    B, T, shift = probe_rows(case, 4), probe_length(case), case.once(loss_shift)
    if not case.has("train_ids") or B * (T - shift) < 4 or T - shift < 2:
        return None
    ids, line = case.once(train_ids), case.once(lines)[0]
    apart = ids[1:-1][(ids[1:-1] != ids[:-2]) & (ids[1:-1] != ids[2:])]
    slope, offset = (line.slope, line.offset) if line.close else (1.0, 0.0)
    x = case.ids(B, T)
    costs = negative_logprobs(case.logits(x))
    by_cost = costs[0, 1].argsort()
    for token, n in zip(*np.unique(apart, return_counts=True), strict=True):
        if n <= ORDINARY * len(ids) or not 0 <= token < case.vocab_size or token == case.given.get("end_of_text"):
            continue
        others = by_cost[by_cost != token]  # training that ignores an id makes it improbable
        pair = others[[0, -1]]
        predicted = slope * costs[0, 1, pair] + offset
        y = np.full((2, B, T), token, np.int32)
        y[:, 0, 1] = pair
        measured = [case.number("loss", x, np.roll(targets, shift, axis=1)) for targets in y]
        if np.abs(measured - predicted).max() < 0.2 * abs(np.ptp(predicted)):
            return int(token), n / len(ids)
    return None


def loss_verdict(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Return the code and the finding for a loss that is not the mean cross-entropy."""
    by_shape = case.once(lines)
    close = all(line.close for line in by_shape)
    slopes = [line.slope for line in by_shape]
    name = normalisation(case, by_shape) if close else None
    if ignored := ignored_token(case):
        token, share = ignored
        text = f" ({decoded(case, [token])!r})" if case.has("decode") else ""
        return "loss-not-the-mean", {
            "measured": token,
            "expected": "no id of the text",
            "why": f"targets of id {token}{text} are ignored, which is {share:.0%} of the training ids and no padding",
            "remedy": "let the loss ignore only an id that the text does not hold, such as -100 or that of padding",
            "evidence": {"ignored": token, "share": share},
            "explains": (*BY_DENOMINATOR, "future-leak-in-gradient"),  # other targets change how many count
        }
    if close and normal(by_shape) and not name:
        return None
    if name:
        return "loss-not-the-mean", {
            "measured": slopes[0],
            "expected": 1.0,
            "why": f"the loss is {name}: it is {slopes[0]:.4g} times the mean cross-entropy of forward's logits",
            "remedy": "divide the sum of the cross-entropies by the number of targets that count",
            "evidence": {"factors": slopes, "shapes": [list(p.y.shape[1:]) for p in case.once(loss_probes)]},
        }
    misplaced = any(line.misplaced for line in by_shape)
    weights = None if close or misplaced else position_weights(case)
    if weights is not None:
        share = weights / weights.sum()
        b, t = np.unravel_index(share.argmax(), share.shape)
        return "loss-not-the-mean", {
            "measured": float(share.max()),
            "expected": 1 / share.size,
            "why": f"in a batch of {share.shape} row {b}, position {t} has {share.max():.0%} of the weight",
            "remedy": "average over all rows and positions whose targets count",
            "evidence": {"weights": weights.tolist()},
        }
    probe, unit = case.once(loss_probes)[0], unit_of(by_shape)
    return "loss-not-cross-entropy", {
        "measured": slopes[0],
        "expected": 1.0,
        "why": f"the loss rises by {slopes[0]:.3g} per nat of cross-entropy of forward's logits"
        + (
            f": it is in {unit}, so that the first loss is not ln V and gradients are that many times too large"
            if unit
            else f", beside {by_shape[0].offset:.3g} that does not depend on the targets"
            if close
            else ", but does not follow it where targets change places: they are compared with other positions' logits"
            if misplaced
            else ", and is no function of it"
        ),
        "remedy": "take the mean of -log_softmax(logits, axis=-1) at the targets: of logits, not probabilities, on the "
        "vocabulary's axis, without smoothing, with logits and targets flattened in the same order",
        "evidence": {"losses": probe.losses.tolist(), "slopes": slopes},
    }


def of_verdict(case: Case, code: str) -> Found:
    verdict = case.once(loss_verdict)
    return verdict[1] if verdict is not None and verdict[0] == code else None


@check(
    "loss-not-cross-entropy",
    "loss",
    "forward",
    explains=("initial-loss-off", "reported-loss-differs", *IN_TRAINING),
)
def loss_not_cross_entropy(case: Case) -> Found:
    """The loss falls, but it is not the cross-entropy of the model's logits with the targets.

    The loss is computed for targets from the most to the least probable tokens, and mixtures, at two shapes. As a
    function of the mean cross-entropy of forward's logits, a healthy loss is a line of slope 1 within 0.2 % of the
    range, with any offset that does not depend on the targets (z-loss, other terms), and its change is right within a
    quarter where the same targets change places (transposed ones: 0 instead). Also healthy are another multiple of the
    mean, the perplexity, and a mean that ignores one id, or up to a quarter of the positions at one end. A slope that
    gives bits or decimal digits (within 0.3 %) is a fault. With dropout, means of 8 calls are compared within 10 %.
    """
    return of_verdict(case, "loss-not-cross-entropy")


@check(
    "loss-not-the-mean",
    "loss",
    "forward",
    explains=BY_DENOMINATOR,
)
def loss_not_the_mean(case: Case) -> Found:
    """The loss depends on the batch's size or on ignored targets: it is a sum, or a mean with the wrong denominator.

    Measured as in ``loss-not-cross-entropy``: a fault if the slope is B T, B, T or 1 / V within 1 % at both shapes, or
    if positions have different weights. Where at least 5 % of the targets of a batch are ignored, also if the loss is
    the mean over the others times their share, within 1 %: a sum over the others divided by the number of all. And if
    an id is ignored that is more than 1 % of ``train_ids`` between other ids, and so no padding.
    """
    return of_verdict(case, "loss-not-the-mean") or mask_counted(case)


def mask_counted(case: Case) -> Found:
    """Return the finding if the loss of a batch with ignored targets is divided by the number of all positions."""
    if not case.has("batches") or case.once(loss_verdict) is not None:
        return None
    x, y = case.once(train_batch)
    picked, counts = at_targets(negative_logprobs(case.logits(x)), y, case.once(loss_shift))
    share = float(counts.mean())
    if not 0.02 < share < 0.95:
        return None
    ratio = case.number("loss", x, y) / (float(picked[counts].mean()) * case.once(lines)[0].slope)
    if abs(ratio / share - 1) > 0.01:
        return None
    return {
        "measured": ratio,
        "expected": 1.0,
        "why": f"the loss of a batch with {1 - share:.0%} of its targets ignored is {ratio:.3g} times the others' mean",
        "remedy": "divide by the number of targets that are not ignored: (loss * mask).sum() / mask.sum()",
        "evidence": {"share_of_targets_that_count": share},
    }
