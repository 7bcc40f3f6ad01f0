"""Test draws against one rule: their places in the distribution, and the independence of successive draws."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import numpy as np
from numpy.typing import ArrayLike

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.sampling.draws import Draws, ids_of, is_seeded, split
from mlx_gpt.check.doctor.sampling.rules import Rule

SURE = 20.0  # nats by which an explanation must be the better one: false alarm below exp(-20) = 2e-9
RARE = 1e-9  # p-value of a chi-square test that is a finding; least of 3000 healthy sets of draws: 5e-4
UNSURE = 1e-3  # p-value above which draws are taken to follow a rule
NUMBERS = 2000  # random numbers that are tried for one that chooses all ids of a call
ROUNDED = 1e-4  # by which sums of probabilities may differ from the sampler's
FEW = 40  # draws below which the chi-square approximation is not used


def fits(case: Case, calls: Sequence[Draws], rule: Rule) -> bool:
    """Return True if no test rejects that the draws follow the rule and are independent.

    Only one text is tested where identical calls give the same text.
    """
    calls = calls[:1] if case.once(is_seeded) else calls
    return misfit(case, calls, rule)[0] > RARE and repeats(calls, rule) < SURE and one_number(calls, rule) < SURE


def sound(case: Case, calls: Sequence[Draws], rule: Rule) -> bool:
    """Return True if draws may be taken for those of a rule, beside others that are not."""
    return fits(case, calls, rule) and misfit(case, calls, rule)[0] > UNSURE


def misfit(case: Case, calls: Sequence[Draws], rule: Rule) -> tuple[float, float]:
    """Return p-values of the draws under a rule: of all tests, and of the independence of successive draws alone.

    The ids are ordered by probability and by number; each order gives two tests.
    """
    tests = [p_values(places(case, calls, rule, ranked)) for ranked in (True, False)]
    return min(1.0, 4 * min(min(both) for both in tests)), min(1.0, 2 * min(pair for _, pair in tests))


def shares(p: np.ndarray, ids: np.ndarray, ranked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability before each drawn id and its own, (N,) each, of probabilities (N, V).

    ``ranked`` orders the ids by probability, else by number.
    """
    own = p[np.arange(len(p)), ids]
    numbers = np.arange(p.shape[1])[None]
    ties = (p == own[:, None]) & (numbers < ids[:, None])
    before = (p > own[:, None]) | ties if ranked else numbers < ids[:, None]
    return (p * before).sum(axis=1), own


def places(case: Case, calls: Sequence[Draws], rule: Rule, ranked: bool) -> list[np.ndarray]:
    """Return each draw's place in its cumulative distribution, at random within its own share: uniform if it is true.

    Randomized probability integral transform.
    """
    before, own = shares(np.exp(rule(calls)), ids_of(calls), ranked)
    return split(before + own * case.rng.random(len(own)), calls)


def p_values(places: Sequence[np.ndarray]) -> tuple[float, float]:
    """Test places of draws for uniformity, and successive ones for independence, in 5 x 5 cells (3 x 3 below 250).

    Pearson's chi-square; 1 below 40 pairs.
    """
    every = np.concatenate(places) if places else np.zeros(0)
    K = 5 if len(every) >= 250 else 3
    uniform = pair = 1.0
    cell, call = bins(every, K), np.repeat(np.arange(len(places)), [len(place) for place in places])
    if (N := len(every)) >= FEW:
        singles = np.bincount(cell, minlength=K)
        uniform = chi_square(float(np.square(singles - N / K).sum() * K / N), K - 1)
    pairs = (K * cell[:-1] + cell[1:])[call[1:] == call[:-1]]
    cells = np.bincount(pairs, minlength=K * K).reshape(K, K)
    if (N := int(cells.sum())) >= FEW:
        expected = np.outer(cells.sum(axis=1), cells.sum(axis=0)) / N
        statistic = float((np.square(cells - expected) / np.maximum(expected, 1e-9)).sum())
        pair = chi_square(statistic, (K - 1) ** 2)
    return uniform, pair


def bins(place: np.ndarray, K: int) -> np.ndarray:
    return np.clip((place * K).astype(int), 0, K - 1)


def chi_square(statistic: float, freedom: int) -> float:
    """Return the upper tail of the chi-square distribution, of an even number of degrees of freedom (closed form)."""
    term = total = 1.0
    for i in range(1, freedom // 2):
        term *= statistic / 2 / i
        total += term
    return exp(max(-700.0, log(total) - statistic / 2))


def repeats(calls: Sequence[Draws], rule: Rule, across: bool = False) -> float:
    """Return the log of an e-value that draws favour ids which the same call drew before.

    They do if argmax(logits + noise) is drawn with the same noise at every step. The alternative to the rule is a
    mixture for each draw: half the rule, a quarter the rule with ids weighed by (times drawn + 1/2) / (times expected +
    1/2), a quarter the id that was drawn most. If the draws follow the rule and are independent, the log exceeds x with
    probability below e^-x (Ville 1939). ``across`` counts over all calls.
    """
    total = 0.0
    times = expected = np.zeros(0)
    for call, p in zip(calls, split(np.exp(rule(calls)), calls), strict=True):
        if not (across and len(times)):
            times, expected = np.full(p.shape[1], 0.5), np.full(p.shape[1], 0.5)
        for row, i in zip(p, call.new, strict=True):
            if times.max() > 0.5:
                weighed = row * times / expected
                other = (weighed[i] / max(weighed.sum(), 1e-300) + (i == times.argmax())) / max(row[i], 1e-300)
                total += log(0.5 + 0.25 * min(other, 1e9))
            times[i] += 1
            expected += row
    return total


def one_number(calls: Sequence[Draws], rule: Rule, across: bool = False) -> float:
    """Return the log of an e-value for one uniform random number that chooses all ids of a call.

    The alternative is a mixture over numbers, and over orders of the ids by probability and by id: the id in whose
    share of the cumulative distribution the number lies is drawn 99 times of 100. Bounded as that of ``repeats``.
    ``across``: one number for all calls.
    """
    numbers, orders = (np.arange(NUMBERS) + 0.5) / NUMBERS, []
    p = np.exp(rule(calls))
    for ranked in (True, False):
        before, own = (part[:, None] for part in shares(p, ids_of(calls), ranked))
        inside = (before <= numbers) & (numbers < before + own)
        ratios = np.where(inside, np.log(0.01 + 0.99 / np.maximum(own, 1e-9)), log(0.01))
        if across:
            orders.append(log_mean(ratios.sum(axis=0)))
        else:
            orders.append(sum(log_mean(part.sum(axis=0)) for part in split(ratios, calls)))
    return log_mean(orders)


def steps_alike(calls: Sequence[Draws], rule: Rule) -> float:
    """Return the log-likelihood ratio of one random number for all steps to one for each step, the same in all calls.

    For samplers of which identical calls give the same text. 0 where no number explains all draws.
    """
    best, p = 0.0, np.exp(rule(calls))
    for ranked in (True, False):
        low, high = np.zeros(max(len(call.new) for call in calls)), np.ones(max(len(call.new) for call in calls))
        for before, own in zip(*(split(part, calls) for part in shares(p, ids_of(calls), ranked)), strict=True):
            low[: len(own)] = np.maximum(low[: len(own)], before)
            high[: len(own)] = np.minimum(high[: len(own)], before + own)
        widths = np.maximum(high - low, ROUNDED)
        if (width := high.min() - low.max()) > -ROUNDED:
            best = max(best, log(max(width, ROUNDED)) - float(np.log(widths).sum()))
    return best


def log_mean(logs: ArrayLike) -> float:
    """Return the log of the mean of exponentials."""
    return float(np.logaddexp.reduce(logs) - log(np.size(logs)))


def correlation(case: Case, calls: Sequence[Draws], rule: Rule, dependent: bool = False) -> tuple[float, float]:
    """Return the p-value of independent successive draws, and the log e-value of one noise or number in a call.

    ``dependent``: equal calls give equal texts, so that the mean of e-values is one, not their product.
    """
    if dependent:
        return 1.0, max(log_mean([repeats([call], rule) for call in calls]), steps_alike(calls, rule))
    favours = [repeats(calls, rule), one_number(calls, rule)]
    if len(calls) > 1:  # what favours the same ids in every call is no correlation within one
        favours[0] -= max(0.0, repeats(calls, rule, across=True))
        favours[1] -= max(0.0, one_number(calls, rule, across=True))
    return misfit(case, calls, rule)[1], max(favours)
