"""Fit the user's losses for chosen targets by a line in the cross-entropies of forward's logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.data.targets import loss_shift
from mlx_gpt.check.doctor.optimisation.evidence import at_targets, negative_logprobs, probe_rows
from mlx_gpt.check.doctor.probes import EQUAL, probe_length

CALLS = 8  # of a loss with dropout, to average
UNITS = {"nats": 1.0, "bits": 1 / np.log(2), "decimal digits": 1 / np.log(10)}  # slopes of a loss in these
UNIT = 3e-3  # relative tolerance of such a slope
MOVED = 0.25  # relative tolerance of the change of a loss when targets change places


@dataclass(frozen=True)
class LossProbe:
    """Losses (n,) of one input (B, T) for n sets of targets y (n, B, T), and the error of a loss.

    The last two sets hold the same ids at other positions: where each costs least beside other positions, and reversed.
    ``costs``: the cross-entropy for each token, (B, T, V), in evaluation and, if it is given, in training mode.
    """

    y: np.ndarray
    losses: np.ndarray
    error: float
    costs: list[np.ndarray]


@dataclass(frozen=True)
class Line:
    """Losses fitted by slope * mean cross-entropy + offset; ``close`` if they agree within the error.

    ``misplaced`` if they nearly agree, but not for the same targets at other positions.
    """

    slope: float
    offset: float
    close: bool
    through_zero: bool
    error: float  # of the slope
    misplaced: bool


def loss_probes(case: Case) -> list[LossProbe]:
    """Compute losses at two shapes, for targets at five quantiles of probability, mixtures, and at changed places."""
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    probes = [loss_probe(case, probe_rows(case, 4 if case.vocab_size < 10_000 else 2), T)]
    with suppress(CallFailed):  # a loss that takes one shape only
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
    y = np.roll(np.stack([*levels, *mixed, *moved_targets(costs[0])]).astype(np.int32), shift, axis=2)
    values = np.array([[case.number("loss", x, targets.copy()) for _ in range(calls)] for targets in y])
    finite = np.isfinite(values).all(axis=1)  # else all targets may be an id that is ignored
    if finite[:-2].sum() < 6:
        raise NotApplicable("a finite loss")
    chosen = [*np.flatnonzero(finite[:-2]), *((-2, -1) if finite[-2:].all() else (finite.argmax(),) * 2)]
    y, values = y[chosen], values[chosen]
    losses, size = values.mean(axis=1), float(np.abs(values).max())
    error = (0.01 if coarse(runs[0][0]) or coarse(values) else 2e-5) * size
    if random:
        error += 4 * float(values.std(axis=1, ddof=1).max()) / np.sqrt(calls) + 0.1 * float(np.ptp(losses))
    return LossProbe(y, losses, error, costs)


def moved_targets(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets (B, T) that cost least beside other positions, and the same in reverse order."""
    own = (costs.mean(axis=(0, 1)) - costs).argmax(axis=-1)
    return own, own[::-1, ::-1]


def line(losses: np.ndarray, means: np.ndarray, error: float) -> Line:
    """Fit losses by a straight line in the means."""
    slope, offset = np.polyfit(means, losses, 1)
    allowed = error + 2e-3 * abs(slope) * np.ptp(means)
    distance = np.abs(losses - slope * means - offset).max()
    spread = float(np.ptp(means))
    moved, expected = losses[-1] - losses[-2], slope * (means[-1] - means[-2])
    misplaced = bool(distance <= 5 * allowed and abs(moved - expected) > 2 * error + MOVED * abs(expected))
    through_zero = bool(abs(offset) <= 3 * allowed * means.max() / spread)
    close = bool(distance <= allowed) and not misplaced
    of_slope = 0.01 * abs(float(slope)) + 2 * error / spread
    return Line(float(slope), float(offset), close, through_zero, of_slope, misplaced)


def kept(B: int, T: int) -> Iterator[np.ndarray]:
    """Yield the positions (B, T) over which a loss may be a mean: all, or without up to a quarter at one end."""
    yield np.ones((B, T), bool)
    for k in range(1, T // 4 + 1):
        yield np.broadcast_to(np.arange(T) >= k, (B, T))
        yield np.broadcast_to(np.arange(T) < T - k, (B, T))


def readings(case: Case, probe: LossProbe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield losses and mean cross-entropies, (n,) each, that agree if the loss is healthy, for each way to define it.

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
    """Return the line for each probe, by the first definition of the loss that fits, else the closest."""
    by_reading: list[list[Line]] = []
    for readings_of_probes in zip(*(readings(case, probe) for probe in case.once(loss_probes)), strict=False):
        if any(np.isnan(means).any() or np.ptp(means) < 1e-3 for _, means in readings_of_probes):
            continue
        errors = [probe.error for probe in case.once(loss_probes)]
        pairs = zip(readings_of_probes, errors, strict=True)
        by_reading.append([line(losses, means, error) for (losses, means), error in pairs])
        if all(fit.close for fit in by_reading[-1]) and normal(by_reading[-1]):
            return by_reading[-1]
    if not by_reading:
        raise NotApplicable("a model whose logits differ between tokens")
    return next((fits for fits in by_reading if all(fit.close for fit in fits)), by_reading[0])


def unit_of(fits: list[Line]) -> str | None:
    """Return the unit of a loss that is a mean cross-entropy in another unit than nats."""
    if not all(fit.close and fit.through_zero for fit in fits):
        return None
    units = (unit for unit, size in UNITS.items() if all(abs(fit.slope / size - 1) <= UNIT for fit in fits))
    return next((unit for unit in units if unit != "nats"), None)


def normal(fits: list[Line]) -> bool:
    """Return True if the slopes are those of a mean: 1, or the same multiple of it at each shape.

    Other terms of a loss may add a positive offset; a negative one is a softmax without its denominator. A multiple
    that gives bits or decimal digits is a logarithm to another base, and a fault.
    """
    slopes = np.array([fit.slope for fit in fits])
    if all(abs(fit.slope - 1) <= fit.error for fit in fits):
        return all(fit.offset > 0 or fit.through_zero for fit in fits)
    if unit_of(fits):
        return False
    return len(fits) > 1 and np.allclose(slopes, slopes[0], rtol=0.01) and all(fit.through_zero for fit in fits)
