"""The user's loss against the cross-entropy of forward's logits, target by target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.targets import loss_shift
from mlx_gpt.check.doctor.forward.probes import EQUAL, probe_length
from mlx_gpt.check.doctor.optimisation.evidence import at_targets, coarse, negative_logprobs, probe_rows, train_batch

CALLS = 8  # of a loss with dropout, to average
IN_TRAINING = ("learning-rate-too-high", "learning-rate-too-low", "cannot-memorise-a-batch")
UNITS = (1.0, 1 / np.log(2), 1 / np.log(10))  # nats, bits, decimal digits


@dataclass(frozen=True)
class LossProbe:
    """Losses (n,) of inputs (B, T) for n sets of targets y (n, B, T), and the error of a loss.

    ``costs``: for each way to run the model, the cross-entropy (B, T, V) of its logits with each token.
    """

    y: np.ndarray
    losses: np.ndarray
    error: float
    costs: list[np.ndarray]


@dataclass(frozen=True)
class Line:
    """Losses as slope * mean cross-entropy + offset; ``close`` if they are so within the error."""

    slope: float
    offset: float
    close: bool
    through_zero: bool
    error: float  # of the slope


def loss_probes(case: Case) -> list[LossProbe]:
    """Call the loss with targets of five degrees of probability and mixtures of the extremes, at two shapes."""
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    probes = [loss_probe(case, probe_rows(case, 4 if case.vocab_size < 10_000 else 2), T)]
    with suppress(CallFailed):  # a loss for one shape
        probes.append(loss_probe(case, probe_rows(case, 3), max(T // 2, 2)))
    return probes


def loss_probe(case: Case, rows: int, T: int) -> LossProbe:
    x, shift = case.ids(rows, T), case.once(loss_shift)
    random = abs(case.number("loss", x, x) - case.number("loss", x, x)) > EQUAL
    calls = CALLS if random else 1
    runs = [[case.logits(x, name) for _ in range(calls)] for name in ("forward", "forward_training") if case.has(name)]
    costs = [np.mean([negative_logprobs(logits) for logits in run], axis=0) for run in runs]
    if not np.isfinite(costs[0]).all():
        raise NotApplicable("finite logits")
    order = np.argsort(costs[0], axis=-1)
    levels = [order[..., int(q * (case.vocab_size - 1))] for q in (0, 0.25, 0.5, 0.75, 1)]
    mixed = [np.where(case.rng.random((rows, T)) < 0.5, levels[0], levels[-1]) for _ in range(6)]
    y = np.roll(np.stack([*levels, *mixed]).astype(np.int32), shift, axis=2)
    values = np.array([[case.number("loss", x, one.copy()) for _ in range(calls)] for one in y])
    finite = np.isfinite(values).all(axis=1)  # all targets may be of an id that is ignored
    if finite.sum() < 6:
        raise NotApplicable("a finite loss")
    y, values = y[finite], values[finite]
    losses, size = values.mean(axis=1), float(np.abs(values).max())
    error = (0.01 if coarse(runs[0][0]) or coarse(values) else 2e-5) * size
    if random:
        error += 4 * float(values.std(axis=1, ddof=1).max()) / np.sqrt(calls) + 0.1 * float(np.ptp(losses))
    return LossProbe(y, losses, error, costs)


def line(losses: np.ndarray, means: np.ndarray, error: float) -> Line:
    """Fit losses by a straight line in the means."""
    slope, offset = np.polyfit(means, losses, 1)
    allowed = error + 2e-3 * abs(slope) * np.ptp(means)
    close = np.abs(losses - slope * means - offset).max() <= allowed
    spread = float(np.ptp(means))
    through_zero = bool(abs(offset) <= 3 * allowed * means.max() / spread)
    return Line(float(slope), float(offset), bool(close), through_zero, 0.01 * abs(float(slope)) + 2 * error / spread)


def kept(B: int, T: int) -> Iterator[np.ndarray]:
    """Yield which positions (B, T) a mean may be of: all, or all but up to a quarter at the start or the end."""
    yield np.ones((B, T), bool)
    for k in range(1, T // 4 + 1):
        yield np.broadcast_to(np.arange(T) >= k, (B, T))
        yield np.broadcast_to(np.arange(T) < T - k, (B, T))


def readings(case: Case, probe: LossProbe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield losses, and means of the cross-entropies, that may be equal in a healthy loss.

    It may run the model in training mode, ignore an id (padding), leave out positions at an end, or be the perplexity.
    """
    shift = case.once(loss_shift)
    ends = (None, 0, case.vocab_size - 1, case.given.get("end_of_text"))
    for costs in probe.costs:
        for place, keep in enumerate(kept(*probe.y.shape[1:])):
            for ignored in ends[: 1 if place else 4]:
                means = []
                for y in probe.y:
                    picked, counts = at_targets(costs, y, shift)
                    counts = counts & keep[:, : counts.shape[1]]
                    if ignored is not None:
                        counts &= y[:, shift:] != ignored
                    means.append(picked[counts].mean() if counts.any() else np.nan)
                yield probe.losses, np.array(means)
                if not place and ignored is None and (probe.losses > 0).all():
                    yield np.log(probe.losses), np.array(means)


def lines(case: Case) -> list[Line]:
    """Return the line for each probe, of the reading of the loss that comes closest."""
    found: list[list[Line]] = []
    for readings_of_probes in zip(*(readings(case, probe) for probe in case.once(loss_probes)), strict=False):
        if any(np.isnan(means).any() or np.ptp(means) < 1e-3 for _, means in readings_of_probes):
            continue
        errors = [probe.error for probe in case.once(loss_probes)]
        pairs = zip(readings_of_probes, errors, strict=True)
        found.append([line(losses, means, error) for (losses, means), error in pairs])
        if all(one.close for one in found[-1]) and normal(found[-1]):
            return found[-1]
    if not found:
        raise NotApplicable("a model whose logits differ between tokens")
    return next((one for one in found if all(each.close for each in one)), found[0])


def normal(found: list[Line]) -> bool:
    """Return whether the slopes are those of a mean: of a unit, or the same multiple of the mean at each shape.

    A mean may have a positive offset, as other terms of a loss add; a negative one lacks the softmax's denominator.
    """
    slopes = np.array([one.slope for one in found])
    if any(all(abs(one.slope - unit) <= one.error for one in found) for unit in UNITS):
        return all(one.offset > 0 or one.through_zero for one in found)
    return len(found) > 1 and np.allclose(slopes, slopes[0], rtol=0.01) and all(one.through_zero for one in found)


def normalisation(case: Case, found: list[Line]) -> str | None:
    """Return what the loss is instead of the mean, by its slope at each shape; else None."""
    V = case.vocab_size
    for name, factor in {
        "the sum over all positions": lambda B, T: B * T,
        "a sum over positions, a mean over rows only": lambda B, T: T,
        "a sum over rows, a mean over positions only": lambda B, T: B,
        "the mean over the vocabulary too": lambda B, T: 1 / V,
    }.items():
        shift = case.once(loss_shift)
        sizes = np.array([factor(p.y.shape[1], p.y.shape[2] - shift) for p in case.once(loss_probes)])
        slopes = np.array([one.slope for one in found])
        fits = any(np.allclose(slopes, unit * sizes, rtol=0.01) for unit in UNITS)
        if fits and not np.allclose(sizes, 1) and all(one.through_zero for one in found):
            return name
    return None


def position_weights(case: Case) -> np.ndarray | None:
    """Return the weight of each position's cross-entropy in the loss, (B, T); None if it is not linear in them."""
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
    unequal = weights[:, : T - shift].max() > 1.05 * weights[:, : T - shift].min()
    return weights if unequal and weights.sum() > 0 and weights.min() > -1e-3 else None


def loss_verdict(case: Case) -> tuple[str, dict[str, Any]] | None:
    """Return the code and the finding for a loss that is not the mean cross-entropy."""
    found = case.once(lines)
    close = all(one.close for one in found)
    slopes = [one.slope for one in found]
    name = normalisation(case, found) if close else None
    if close and normal(found) and not name:
        return None
    if name:
        return "loss-not-the-mean", {
            "measured": slopes[0],
            "expected": 1.0,
            "why": f"the loss is {name}: it is {slopes[0]:.4g} times the mean cross-entropy of forward's logits",
            "remedy": "divide the sum of the cross-entropies by the number of targets that count",
            "evidence": {"factors": slopes, "shapes": [list(p.y.shape[1:]) for p in case.once(loss_probes)]},
        }
    weights = None if close else position_weights(case)
    if weights is not None:
        share = weights / weights.sum()
        b, t = np.unravel_index(share.argmax(), share.shape)
        return "loss-not-the-mean", {
            "measured": float(share.max()),
            "expected": 1 / share.size,
            "why": f"row {b}, position {t} of {share.shape} has {share.max():.0%} of all the weight",
            "remedy": "average over all rows and positions whose targets count",
            "evidence": {"weights": weights.tolist()},
        }
    probe = case.once(loss_probes)[0]
    return "loss-not-cross-entropy", {
        "measured": slopes[0],
        "expected": 1.0,
        "why": f"the loss rises by {slopes[0]:.3g} per nat of cross-entropy of forward's logits"
        + (f", with {found[0].offset:.3g} that no target changes" if close else ", and is no function of it"),
        "remedy": "take the mean of -log_softmax(logits, axis=-1) at the targets: of logits, not probabilities, on the "
        "vocabulary's axis, without smoothing",
        "evidence": {"losses": probe.losses.tolist(), "slopes": slopes},
    }


def of_verdict(case: Case, code: str) -> Found:
    found = case.once(loss_verdict)
    return found[1] if found is not None and found[0] == code else None


@check(
    "loss-not-cross-entropy",
    "loss",
    "forward",
    explains=("initial-loss-off", "reported-loss-differs", *IN_TRAINING),
)
def loss_not_cross_entropy(case: Case) -> Found:
    """The loss falls, but it is not the cross-entropy of the model's logits with the targets.

    The loss of targets of five degrees of probability and of their mixtures, at two shapes, against the mean
    cross-entropy of forward's logits: healthy losses are a line with slope 1 (nats) within 0.2 % of the range, with any
    offset that the targets do not change (z-loss, other terms). A multiple of the mean, bits and perplexity are healthy
    too, and a mean that ignores an id, or a quarter of the positions at one end. With dropout: means of 8 calls, 10 %.
    """
    return of_verdict(case, "loss-not-cross-entropy")


@check(
    "loss-not-the-mean",
    "loss",
    "forward",
    explains=("initial-loss-off", "reported-loss-differs", "accumulation-differs", *IN_TRAINING),
)
def loss_not_the_mean(case: Case) -> Found:
    """The loss and the right learning rate depend on the batch's size, as the loss is a sum, or counts what is masked.

    Measured as ``loss-not-cross-entropy``: a slope of B T, B, T or 1 / V within 2 % at two shapes, or weights that
    differ between positions. Where batches have ignored targets (5 % and more): a loss that is the masked mean times
    their share, within 1 %.
    """
    return of_verdict(case, "loss-not-the-mean") or mask_counted(case)


def mask_counted(case: Case) -> Found:
    """Compare the loss of a batch with ignored targets with their sum divided by all positions."""
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
        "why": f"the loss of a batch with {1 - share:.0%} of its targets ignored is {ratio:.3g} of the others' mean",
        "remedy": "divide by the number of targets that are not ignored: (loss * mask).sum() / mask.sum()",
        "evidence": {"share_of_targets_that_count": share},
    }
