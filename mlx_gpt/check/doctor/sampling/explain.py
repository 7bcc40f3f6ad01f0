"""Choose among explanations of draws by their likelihood, and choose settings at which they differ most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, Case
from mlx_gpt.check.doctor.sampling.draws import Draws, chosen, count, draw_many, ids_of, is_seeded
from mlx_gpt.check.doctor.sampling.fit import SURE, fits
from mlx_gpt.check.doctor.sampling.rules import Rule

Read = Callable[[list[Draws]], list[Draws]]
LEAST = -15.0  # log-probability of an id that a rule never draws: one may be an accident, two are not
DECIDED = 10.0  # nats by which an explanation must be worse than the best to be excluded
ENOUGH = 0.7  # nats per draw, with which 30 draws exclude a fault
CHUNK = 30  # draws after which the evidence is weighed again


@dataclass(frozen=True)
class Explanation:
    """A rule that draws may follow, with its description and the codes of its faults, none for a right rule."""

    name: str
    rule: Rule
    codes: tuple[str, ...] = ()
    shows: bool = True  # has an effect on the first id of a call, by which probes are chosen
    cost: float = 0.0  # nats by which it must be better than other explanations


@dataclass(frozen=True)
class Probe:
    """Prompts and settings for draws, and the explanations of these, which have the same order in all probes.

    ``tells``: places of the explanations that the draws tell apart from others; empty for all of them.
    """

    prompts: list[list[int]]
    settings: dict[str, Any]
    explanations: Sequence[Explanation]
    tells: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answer:
    """The best explanation, the codes of others that are not excluded, and the number of draws.

    ``gain``: nats by which the draws are more probable than by the best right rule. ``fits``: no test rejects it.
    """

    best: Explanation
    gain: float
    fits: bool
    open: set[str]
    draws: int


def log_likelihood(calls: Sequence[Draws], rule: Rule) -> float:
    """Return the log-likelihood of all draws in nats; a draw has probability e^-15 at least."""
    return float(np.maximum(chosen(rule(calls), ids_of(calls)), LEAST).sum()) if calls else 0.0


Predicted = Sequence[tuple[Sequence[Draws], Rule]]  # sets of draws, each with the rule that it may follow


def score(case: Case, predicted: Predicted, right: Predicted) -> float:
    """Return the log-likelihood of draws in nats; beside ``right``, by ``favour``, if identical calls repeat."""
    if case.once(is_seeded):
        return favour(predicted, right)
    return sum(log_likelihood(calls, rule) for calls, rule in predicted)


def favour(predicted: Predicted, right: Predicted) -> float:
    """Return the log of an e-value in favour of a prediction over ``right``, if calls may share random numbers.

    Only one draw of each step counts: the one for whose text the two predictions differ most, which is known before it
    is drawn. Each draw of an id that the prediction excludes counts against it.
    """
    every = [call for calls, _ in right for call in calls]
    ids, step = ids_of(every), np.concatenate([np.arange(len(call.new)) for call in every])
    p, q = (np.concatenate([rule(calls) for calls, rule in group if calls]) for group in (right, predicted))
    own_p, own_q = (np.maximum(chosen(logprobs, ids), LEAST) for logprobs in (p, q))
    order = np.lexsort((-divergences(q, p), step))
    first = order[np.unique(step[order], return_index=True)[1]]
    return float((own_q - own_p)[first].sum() + LEAST * (own_q <= LEAST).sum())


def choose(scores: Sequence[float], explanations: Sequence[Explanation]) -> tuple[int, float, set[str]]:
    """Return the best explanation's index, its gain over the best right rule, and the codes that are not excluded.

    Each fault of an explanation must make the draws e^20 times as probable, so that right and simple explanations are
    preferred. If a rule is true, another explanation gains x nats over it with probability below e^-x, at whatever
    number of draws one stops (Ville 1939).
    """
    best = max(range(len(scores)), key=lambda i: scores[i] - SURE * len(explanations[i].codes) - explanations[i].cost)
    pairs = [*zip(scores, explanations, strict=True)]
    right = max(score for score, explanation in pairs if not explanation.codes)
    near = [explanation for score, explanation in pairs if score > scores[best] - DECIDED and explanation.shows]
    return best, scores[best] - right, {other.codes[0] for other in near if len(other.codes) == 1}


def weigh(
    case: Case, probes: Sequence[Probe], read: Read, rivals: Sequence[Read] = (), n: int = 6, most: int = 480
) -> Answer:
    """Draw with each probe that tells in turn until one explanation is left, at most ``most`` times with each.

    ``n``: ids of a call. ``read`` computes the logits of draws after the text that the sampler reads, and ``rivals``
    those after texts that it may read as well: a fault must explain the draws better than right rules do with these.
    """
    explanations = probes[0].explanations
    drawn: list[list[Draws]] = [[] for _ in probes]
    scores, short = np.zeros(len(explanations)), False
    near = {*range(len(explanations))}  # places of the explanations that are not excluded
    while True:
        latest: list[list[Draws]] = []
        for probe, mine in zip(probes, drawn, strict=True):
            if probe.tells and not probe.tells & near:
                latest.append([])
                continue
            start = len(mine) % len(probe.prompts)
            prompts = [*probe.prompts[start:], *probe.prompts[:start]]
            try:
                latest.append(read(draw_many(case, prompts, CHUNK, n, **probe.settings)))
            except BudgetSpent:
                if not all(drawn):
                    raise
                latest.append([])
            mine += latest[-1]
            short = short or count(latest[-1]) < CHUNK
        scores += likelihoods(case, probes, latest, latest)
        best, gain, left = choose(scores.tolist(), explanations)
        left -= {*explanations[best].codes}
        near = {*np.flatnonzero(scores > scores[best] - SURE).tolist()}
        if not left or short or max(map(count, drawn)) >= most or case.once(is_seeded):
            break
    fit = all(fits(case, draws, probe.explanations[best].rule) for probe, draws in zip(probes, drawn, strict=True))
    answer = Answer(explanations[best], gain, fit, left, sum(map(count, drawn)))
    if explanations[best].codes or not fit:
        for rival in rivals:
            other = likelihoods(case, probes, [rival(draws) for draws in drawn], drawn)
            other[[bool(explanation.codes) for explanation in explanations]] = -np.inf
            if not fit or scores[best] - other.max() < SURE:
                codes = {*explanations[best].codes} or {"setting-wrong"}
                return replace(answer, best=explanations[int(other.argmax())], gain=0.0, fits=True, open=left | codes)
    return answer


def likelihoods(
    case: Case, probes: Sequence[Probe], drawn: Sequence[list[Draws]], right: Sequence[list[Draws]]
) -> np.ndarray:
    """Return the score of each explanation; ``right``: the same draws, with the logits after the right text."""
    same = zip(*(probe.explanations for probe in probes), strict=True)  # each explanation, at all probes
    rules = [[explanation.rule for explanation in at_probes] for at_probes in same]
    first = next(i for i, explanation in enumerate(probes[0].explanations) if not explanation.codes)
    sound = [*zip(right, rules[first], strict=True)]
    return np.array([score(case, [*zip(drawn, at_probes, strict=True)], sound) for at_probes in rules])


def telling(options: Sequence[Probe], rows: Sequence[Draws]) -> list[Probe]:
    """Return few settings and prompts, at which each fault differs from all right rules.

    For each fault the best of the options is chosen, unless one that was chosen before has ``ENOUGH`` nats per draw for
    it: the Kullback-Leibler divergence, at the quarter of the prompts where it is largest. ``rows`` are draws of one id
    after the prompts, which all options share.
    """
    nats = np.stack([differences(probe, rows) for probe in options])  # option, fault, prompt
    most = np.argsort(-nats, axis=2)[:, :, : max(4, nats.shape[2] // 4)]
    chosen: dict[int, set[int]] = {}  # option, places of the prompts
    for fault in np.argsort(np.take_along_axis(nats, most, axis=2).mean(axis=2).max(axis=0)):
        if not any(nats[option, fault, [*places]].mean() >= ENOUGH for option, places in chosen.items()):
            option = int(np.take_along_axis(nats[:, fault], most[:, fault], axis=1).mean(axis=1).argmax())
            chosen.setdefault(option, set()).update(most[option, fault].tolist())
    return [replace(options[i], prompts=[options[i].prompts[at] for at in sorted(chosen[i])]) for i in chosen]


def telling_settings(options: Sequence[Probe], rows: Sequence[Draws]) -> list[Probe]:
    """Return for each fault the option at which it differs most from right rules, on average over draws."""
    nats = np.stack([differences(probe, rows).mean(axis=1) for probe in options])  # option, fault
    faults = [i for i, explanation in enumerate(options[0].explanations) if explanation.codes and explanation.shows]
    tells: dict[int, set[int]] = {}
    for fault, option in zip(faults, nats.argmax(axis=0).tolist(), strict=True):
        tells.setdefault(option, set()).add(fault)
    return [replace(options[i], tells=frozenset(tells[i])) for i in sorted(tells)]


def differences(probe: Probe, rows: Sequence[Draws]) -> np.ndarray:
    """Return the divergence of each fault that shows in the first id from the nearest right rule: (faults, rows)."""
    shown = [explanation for explanation in probe.explanations if explanation.shows]
    right = [explanation.rule(rows) for explanation in shown if not explanation.codes]
    faulty = [explanation.rule(rows) for explanation in shown if explanation.codes]
    return np.stack([np.min([divergences(p, q) for q in right], axis=0) for p in faulty])


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Kullback-Leibler divergence of log-probabilities (N, V) in nats, (N,), each at most 3."""
    terms = np.exp(p) * (np.maximum(p, -60) - np.maximum(q, -60))
    return np.minimum(terms.sum(axis=1), 3.0)
