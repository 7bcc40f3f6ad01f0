"""Draws with all settings off or only the temperature set, and the likelihood of each explanation of them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.sampling.contexts import TEXT, Named, read_otherwise, windows
from mlx_gpt.check.doctor.sampling.draws import (
    Draws,
    accepted,
    budget,
    count,
    draw_many,
    is_seeded,
    outside,
    settings_off,
)
from mlx_gpt.check.doctor.sampling.explain import Predicted, log_likelihood, score
from mlx_gpt.check.doctor.sampling.fit import SURE
from mlx_gpt.check.doctor.sampling.probes import GRID, flat_temperature, sharp, short_prompts, temperatures
from mlx_gpt.check.doctor.sampling.rules import Base
from mlx_gpt.check.doctor.sampling.texts import logits_after, rounding, shapes

DRAWS = {True: 120, False: 1200}  # at temperature 1, where the temperature can be set and where not
MORE = (600, 1800)  # further draws where those before do not decide what is read
NUMBERS = 5e7  # logits of further draws, at most
SCALES = (0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)  # factors of a hidden temperature

Evidence = list[tuple[float, list[Draws]]]  # draws by temperature
Candidate = tuple[Named, Base]  # the text that is read, and the distribution that is drawn from
Scores = dict[Candidate, float]  # log-likelihood of all draws in nats


def evidence(case: Case) -> Evidence:
    """Draw with every setting off: at temperature 1, at the one that tells most, and at its inverse."""
    prompts, has_temperature = case.once(short_prompts), "temperature" in accepted(case)
    first = DRAWS[has_temperature] if has_temperature or not case.once(is_seeded) else 4 * DRAWS[False]
    drawn = [(1.0, draw_many(case, prompts, first, **settings_off(case)))]
    if has_temperature:
        best, flat = case.once(sharp), case.once(flat_temperature)
        total = int(np.clip(80 / max(best.nats, 0.01), 80, 400))
        drawn.append((best.temperature, sharp_draws(case, total)))
        if flat != 1:
            drawn.append((flat, draw_many(case, prompts, 80, **settings_off(case, temperature=flat))))
    return drawn


def sharp_draws(case: Case, total: int) -> list[Draws]:
    best = case.once(sharp)
    return draw_many(case, best.prompts, total, 3, **settings_off(case, temperature=best.temperature))


def in_turn(case: Case) -> Iterator[tuple[Scores, dict[Named, Evidence]]]:
    """Yield the scores of the candidates and the draws, with their logits after each text that may be read.

    Each time there are more draws than before: first those of ``evidence``; then draws at a temperature of the size of
    probabilities, if these may be what it divides; then at the temperature that tells most, if they can decide; and
    last greedy texts.
    """
    drawn = list(case.once(evidence))
    start = time.monotonic()
    scores, draws = candidates(case, drawn)
    yield scores, draws
    seconds = (time.monotonic() - start) / sum(count(calls) for _, calls in drawn)  # of a draw
    if low := low_temperature(case, scores):
        drawn.append(
            (low, draw_many(case, case.once(short_prompts), DRAWS[True], **settings_off(case, temperature=low)))
        )
        scores, draws = candidates(case, drawn)
        yield scores, draws
    for more in MORE if can_decide(case) else ():
        left = case.once(budget)[0] - time.monotonic()
        if case.vocab_size * more > NUMBERS or seconds * more > left / 4:
            break
        try:
            drawn[1] = (drawn[1][0], [*drawn[1][1], *sharp_draws(case, more)])
        except BudgetSpent:
            break
        scores, draws = candidates(case, drawn)
        yield scores, draws
    exact = greedy_scores(case)
    yield {(read, base): score + exact.get(read, 0.0) for (read, base), score in scores.items()}, draws


def low_temperature(case: Case, scores: Scores) -> float | None:
    """Return a sixteenth of the mean probability of an id, if a sampler that divides probabilities may be the best.

    Flat logits divided by 1 and their probabilities divided by 1/V have almost one softmax.
    """
    low, best = 1 / (16 * case.vocab_size), max(scores.values())
    near = {base.kind for (_, base), score in scores.items() if score > best - SURE}
    if "temperature" not in accepted(case) or not near & {"twice", "outside"} or low < 5 * shapes(case).rounding:
        return None
    return low if low < case.once(temperatures)[0] == GRID[0] else None


def can_decide(case: Case) -> bool:
    """Return True if ``evidence`` is too little to tell what is read, and ``MORE`` draws are enough."""
    if "temperature" not in accepted(case) or case.once(is_seeded):
        return False
    return 80 < 80 / max(case.once(sharp).nats, 0.01) < sum(MORE)


def candidates(case: Case, drawn: Evidence) -> tuple[Scores, dict[Named, Evidence]]:
    """Return the scores of candidates, the simplest first, and the draws with their logits after each text.

    All distributions are scored for the right text; for each other text the right one and the best so far; and all of
    them for the best of the other texts.
    """
    scores: Scores = {}
    draws = {TEXT: drawn}

    def add(read: Named, distributions: list[Base]) -> None:
        for base in distributions:
            if (read, base) not in scores:
                scores[read, base] = score(case, predicted(draws[read], base), predicted(drawn, Base()))

    every = bases(case, len(drawn) > 1)
    add(TEXT, every)
    likely = max(every, key=lambda base: scores[TEXT, base])
    for name, window in windows(case).items():
        draws[name] = [(temperature, read_otherwise(case, calls, window)) for temperature, calls in drawn]
        add(name, [Base(), likely])
    best, _ = max((candidate for candidate in scores if candidate[0] != TEXT), key=scores.__getitem__)
    add(best, every)
    return scores, draws


def bases(case: Case, with_temperature: bool) -> list[Base]:
    """Return the distributions that may be drawn from, the right one first."""
    ways = ("divides", "ignored", "multiplies") if with_temperature else ("divides",)
    kinds = ("softmax", "twice", "outside") if with_temperature else ("softmax", "twice")
    distributions = [Base(kind, way) for way in ways for kind in kinds]
    distributions += [Base("argmax", margin=rounding(case))]
    distributions += [Base(shift=shift, wraps=not case.once(outside)) for shift in (1, -1)]
    distributions += [Base("uniform"), *(Base(scale=scale) for scale in SCALES)]
    return distributions + ([Base(temperature="squared")] if with_temperature else [])


def predicted(drawn: Evidence, base: Base) -> Predicted:
    return [(calls, base.rule(temperature)) for temperature, calls in drawn]


def codes_of(read: Named, base: Base) -> tuple[str, ...]:
    kinds = {"twice": "probabilities-as-logits", "outside": "probabilities-as-logits", "argmax": "sampler-too-narrow"}
    ways = {"ignored": "setting-ignored", "multiplies": "setting-inverted", "squared": "setting-wrong"}
    other = "sampler-not-the-model" if base.other else None
    return tuple(code for code in (read[0], kinds.get(base.kind), ways.get(base.temperature), other) if code)


def greedy_scores(case: Case) -> dict[Named, float]:
    """Return the log-likelihood of greedy texts for each text that may be read, {} if none of them explains the draws.

    The prompts are those after which the texts predict different ids. The likelihood is at a temperature of the size of
    rounding in place of 0, so that an id which rounding may choose costs little.
    """
    if "temperature" not in accepted(case):
        return {}
    prompts = case.once(short_prompts)
    reads = {TEXT: lambda prompt, new: [*prompt, *new], **windows(case)}
    true = logits_after(case, prompts)
    differ = np.zeros(len(prompts))
    for read in reads.values():
        texts = [read(prompt, []) for prompt in prompts]
        if all(texts):
            other = logits_after(case, texts).argmax(axis=1)
            differ += true.max(axis=1) - true[np.arange(len(prompts)), other] > 8 * rounding(case)
    chosen = [prompts[i] for i in np.argsort(-differ)[:24]]
    try:
        calls = draw_many(case, chosen, 60, 3, **settings_off(case, temperature=0.0))
    except (CallFailed, BudgetSpent):  # refuses 0
        return {}
    rule = Base().rule(2 * rounding(case))
    exact = {name: log_likelihood(read_otherwise(case, calls, read), rule) for name, read in reads.items()}
    return exact if max(exact.values()) > -0.5 * count(calls) else {}
