"""Draws with the settings off or only the temperature set, and how well each explanation predicts them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.sampling.contexts import TEXT, Named, read_otherwise, windows
from mlx_gpt.check.doctor.sampling.draws import Draws, accepted, budget, count, draw_many, is_seeded, settings_off
from mlx_gpt.check.doctor.sampling.explain import Predicted, log_likelihood, score
from mlx_gpt.check.doctor.sampling.fit import SURE
from mlx_gpt.check.doctor.sampling.probes import GRID, flat_temperature, sharp, short_prompts, temperatures
from mlx_gpt.check.doctor.sampling.rules import Base
from mlx_gpt.check.doctor.sampling.texts import logits_after, rounding, shapes

DRAWS = {True: 120, False: 1200}  # at one temperature, by whether it can be set
MORE = (600, 1800)  # further draws where those before leave open what is read
NUMBERS = 5e7  # of logits that further draws may have
SCALES = (0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)  # of a temperature that is set besides

Evidence = list[tuple[float, list[Draws]]]  # draws by temperature
Candidate = tuple[Named, Base]  # what is read, and what is drawn from
Scores = dict[Candidate, float]  # log-likelihood of all draws in nats


def evidence(case: Case) -> Evidence:
    """Draw with every setting off: at temperature 1, at one that tells most, and at one on the other side of 1."""
    prompts, has_temperature = case.once(short_prompts), "temperature" in accepted(case)
    first = DRAWS[has_temperature] if has_temperature or not case.once(is_seeded) else 4 * DRAWS[False]
    found = [(1.0, draw_many(case, prompts, first, **settings_off(case)))]
    if has_temperature:
        best, flat = case.once(sharp), case.once(flat_temperature)
        total = int(np.clip(80 / max(best.nats, 0.01), 80, 400))
        found.append((best.temperature, sharp_draws(case, total)))
        if flat != 1:
            found.append((flat, draw_many(case, prompts, 80, **settings_off(case, temperature=flat))))
    return found


def sharp_draws(case: Case, total: int) -> list[Draws]:
    best = case.once(sharp)
    return draw_many(case, best.prompts, total, 3, **settings_off(case, temperature=best.temperature))


def in_turn(case: Case) -> Iterator[tuple[Scores, dict[Named, Evidence]]]:
    """Yield the score of each candidate, and the draws with the logits after what is read: of more draws each time.

    Further draws are at a temperature of the size of probabilities, where these may be what it divides; at the
    temperature that tells most, where they can decide; then of greedy texts.
    """
    found = list(case.once(evidence))
    start = time.monotonic()
    scores, draws = candidates(case, found)
    yield scores, draws
    seconds = (time.monotonic() - start) / sum(count(one) for _, one in found)  # of a draw
    if low := low_temperature(case, scores):
        found.append(
            (low, draw_many(case, case.once(short_prompts), DRAWS[True], **settings_off(case, temperature=low)))
        )
        scores, draws = candidates(case, found)
        yield scores, draws
    for more in MORE if can_decide(case) else ():
        left = case.once(budget)[0] - time.monotonic()
        if case.vocab_size * more > NUMBERS or seconds * more > left / 4:
            break
        try:
            found[1] = (found[1][0], [*found[1][1], *sharp_draws(case, more)])
        except BudgetSpent:
            break
        scores, draws = candidates(case, found)
        yield scores, draws
    exact = greedy_scores(case)
    yield {(read, base): score + exact.get(read, 0.0) for (read, base), score in scores.items()}, draws


def low_temperature(case: Case, scores: Scores) -> float | None:
    """Return a sixteenth of the mean probability of an id, if a sampler that divides probabilities may be the best.

    Flat logits divided by 1 and their probabilities divided by 1/V have almost one softmax.
    """
    low, best = 1 / (16 * case.vocab_size), max(scores.values())
    near = {base.kind for (_, base), score in scores.items() if score > best - SURE}
    if "temperature" not in accepted(case) or not near & {"twice", "outside"} or low < 5 * case.once(shapes).rounding:
        return None
    return low if low < case.once(temperatures)[0] == GRID[0] else None


def can_decide(case: Case) -> bool:
    """Return True if some hundreds or thousands of draws would tell what is read."""
    if "temperature" not in accepted(case) or case.once(is_seeded):
        return False
    return 80 < 80 / max(case.once(sharp).nats, 0.01) < sum(MORE)


def candidates(case: Case, found: Evidence) -> tuple[Scores, dict[Named, Evidence]]:
    """Return the scores of what may be read and drawn from, the simple ones first, and the draws after each text.

    All rules after the text, then the two best after all other texts, then all rules after the best of these.
    """
    scores: Scores = {}
    draws = {TEXT: found}

    def add(read: Named, some: list[Base]) -> None:
        for base in some:
            if (read, base) not in scores:
                scores[read, base] = score(case, predicted(draws[read], base), predicted(found, Base()))

    rules = bases(case, len(found) > 1)
    add(TEXT, rules)
    likely = max(rules, key=lambda base: scores[TEXT, base])
    for name, window in windows(case).items():
        draws[name] = [(temperature, read_otherwise(case, one, window)) for temperature, one in found]
        add(name, [Base(), likely])
    best = max((one for one in scores if one[0] != TEXT), key=scores.__getitem__)
    add(best[0], rules)
    return scores, draws


def bases(case: Case, with_temperature: bool) -> list[Base]:
    """Return what may be drawn from, the right one first."""
    ways = ("divides", "ignored", "multiplies") if with_temperature else ("divides",)
    kinds = ("softmax", "twice", "outside") if with_temperature else ("softmax", "twice")
    found = [Base(kind, way) for way in ways for kind in kinds]
    found += [Base("argmax", margin=rounding(case)), Base(shift=1), Base(shift=-1)]
    found += [Base("uniform"), *(Base(scale=scale) for scale in SCALES)]
    return found + ([Base(temperature="squared")] if with_temperature else [])


def predicted(found: Evidence, base: Base) -> Predicted:
    return [(one, base.rule(temperature)) for temperature, one in found]


def codes_of(read: Named, base: Base) -> tuple[str, ...]:
    kinds = {"twice": "probabilities-as-logits", "outside": "probabilities-as-logits", "argmax": "sampler-too-narrow"}
    ways = {"ignored": "setting-ignored", "multiplies": "setting-inverted", "squared": "setting-wrong"}
    other = "sampler-not-the-model" if base.other else None
    return tuple(code for code in (read[0], kinds.get(base.kind), ways.get(base.temperature), other) if code)


def greedy_scores(case: Case) -> dict[Named, float]:
    """Return the log-likelihood of greedy texts after each window, where one of them explains the texts.

    After prompts at which the windows predict other ids. The temperature that is used in place of 0 is of the size of
    rounding, so that an id which rounding may choose costs little.
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
        found = draw_many(case, chosen, 60, 3, **settings_off(case, temperature=0.0))
    except (CallFailed, BudgetSpent):  # refuses 0
        return {}
    rule = Base().rule(2 * rounding(case))
    exact = {name: log_likelihood(read_otherwise(case, found, read), rule) for name, read in reads.items()}
    return exact if max(exact.values()) > -0.5 * count(found) else {}
