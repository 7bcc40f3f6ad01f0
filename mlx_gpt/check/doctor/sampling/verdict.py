"""What the sampler draws from with every setting off or only the temperature set: the model's softmax, or another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable
from mlx_gpt.check.doctor.sampling.contexts import Window, read_otherwise, windows
from mlx_gpt.check.doctor.sampling.draws import (
    Draws,
    accepted,
    budget,
    count,
    draw_many,
    draw_text,
    is_seeded,
    outside,
    settings_off,
    with_logits,
)
from mlx_gpt.check.doctor.sampling.explain import DECIDED, Explanation, choose, log_likelihood
from mlx_gpt.check.doctor.sampling.findings import setting_fault
from mlx_gpt.check.doctor.sampling.fit import RARE, SURE, correlation, fits, misfit
from mlx_gpt.check.doctor.sampling.probes import flat_temperature, sharp, short_prompts
from mlx_gpt.check.doctor.sampling.rules import Base
from mlx_gpt.check.doctor.sampling.texts import logits_after, rounding

DRAWS = {True: 120, False: 1200}  # at one temperature, by whether it can be set
MORE = 2400  # of further draws where the first leave open what is read
SCALES = (0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)  # of a temperature that is set besides
Evidence = list[tuple[float, list[Draws]]]  # draws by temperature


@dataclass(frozen=True)
class Verdict:
    """Findings by code, the codes that the draws do not exclude, and how to predict further draws, where known."""

    findings: dict[str, dict[str, Any]]
    open: set[str] = field(default_factory=set)
    base: Base | None = None
    window: Window | None = None
    rivals: Sequence[Window] = ()  # what it may read instead, by the draws so far

    @property
    def correlated(self) -> bool:
        return "draws-correlated" in self.findings


def evidence(case: Case) -> Evidence:
    """Draw with every setting off: at temperature 1, at one that tells most, and at one on the other side of 1."""
    prompts, has_temperature = case.once(short_prompts), "temperature" in accepted(case)
    found = [(1.0, draw_many(case, prompts, DRAWS[has_temperature], **settings_off(case)))]
    if has_temperature:
        best, flat = case.once(sharp), case.once(flat_temperature)
        total = int(np.clip(80 / max(best.nats, 0.01), 80, 400))
        off = settings_off(case, temperature=best.temperature)
        found.append((best.temperature, draw_many(case, best.prompts, total, 3, **off)))
        if flat != 1:
            found.append((flat, draw_many(case, prompts, 80, **settings_off(case, temperature=flat))))
    return found


def verdict(case: Case) -> Verdict:
    """Return the simplest explanation of the draws: what is read and what is drawn from, or a sampler without fault."""
    found, start = case.once(evidence), time.monotonic()
    explanations, draws = candidates(case, found)
    scores = [score(draws[window], base) for window, base in explanations]
    named = [Explanation(window[1], base.rule(), codes_of(window, base)) for window, base in explanations]
    best, gain, undecided = choose(scores, named)
    if undecided - {*codes_of(*explanations[best])} and (more := more_draws(case, time.monotonic() - start)):
        found[1] = (found[1][0], [*found[1][1], *more])
        explanations, draws = candidates(case, found)
        scores = [score(draws[window], base) for window, base in explanations]
        named = [Explanation(window[1], base.rule(), codes_of(window, base)) for window, base in explanations]
        best, gain, undecided = choose(scores, named)
    if undecided & {"prompt-ignored", "sampler-not-the-model"}:
        exact = greedy_scores(case)
        scores = [score + exact.get(window, 0.0) for score, (window, _) in zip(scores, explanations, strict=True)]
        best, gain, undecided = choose(scores, named)
    window, base = explanations[best]
    seen = draws[window]
    codes = named[best].codes
    if "sampler-too-narrow" in codes and (wrong := not_off(case)):
        return Verdict({"setting-wrong": wrong})
    right = all(fits(case, one, base.rule(temperature)) for temperature, one in seen)
    findings = {code: explained(case, code, window, base, gain, seen) for code in codes}
    reads = windows(case)[window] if window[1] else None
    seeded = case.once(is_seeded)
    dependent = None if right and not seeded else correlated(case, seen, base, seeded)
    if right and not dependent:
        near = {name for value, (name, _) in zip(scores, explanations, strict=True) if value > scores[best] - DECIDED}
        rivals = [windows(case)[name] for name in near if name[1] and name != window]
        return Verdict(findings, undecided - {*codes}, base if base.kind != "argmax" else None, reads, rivals)
    if dependent:
        return Verdict(findings | {"draws-correlated": dependent}, undecided - {*codes}, base, reads)
    if wrong := not_off(case):
        return Verdict({"setting-wrong": wrong})
    return Verdict(unexplained(case, found))


def more_draws(case: Case, seconds: float) -> list[Draws]:
    """Return further draws at the temperature that tells most, where they can decide, and are not too slow.

    ``seconds``: what the explanation of the draws so far took.
    """
    if "temperature" not in accepted(case) or case.once(is_seeded):
        return []
    best, left = case.once(sharp), case.once(budget)[0] - time.monotonic()
    if not 80 < 80 / max(best.nats, 0.01) < MORE or seconds * MORE / 400 > left / 4:
        return []
    try:
        return draw_many(case, best.prompts, MORE, 3, **settings_off(case, temperature=best.temperature))
    except BudgetSpent:
        return []


def greedy_scores(case: Case) -> dict[tuple[str, str], float]:
    """Return the log-likelihood of greedy texts after each window, where one of them explains the texts.

    After prompts at which the windows predict other ids. The temperature that is used in place of 0 is of the size of
    rounding, so that an id which rounding may choose costs little.
    """
    if "temperature" not in accepted(case):
        return {}
    prompts = case.once(short_prompts)
    reads = {("", ""): lambda prompt, new: [*prompt, *new], **windows(case)}
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
    except CallFailed:  # refuses 0
        return {}
    rule = Base().rule(2 * rounding(case))
    exact = {name: log_likelihood(read_otherwise(case, found, read), rule) for name, read in reads.items()}
    return exact if max(exact.values()) > -0.5 * count(found) else {}


def candidates(
    case: Case, found: Evidence
) -> tuple[list[tuple[tuple[str, str], Base]], dict[tuple[str, str], Evidence]]:
    """Return what may be read and drawn from, with the draws' logits after it.

    First all rules after the text, then the two best of all windows, then all rules after the best window.
    """
    temperatures = ("divides", "ignored", "multiplies") if len(found) > 1 else ("divides",)
    kinds = ("softmax", "twice", "outside") if len(found) > 1 else ("softmax", "twice")
    rules = [Base(kind, way) for way in temperatures for kind in kinds]
    rules += [Base("argmax", margin=rounding(case)), Base(shift=1), Base(shift=-1), *map(scaled, SCALES)]
    rules += [Base(temperature="squared")] if len(found) > 1 else []
    draws = {("", ""): found}
    pairs = [(("", ""), base) for base in rules]
    likely = max(rules, key=lambda base: score(found, base))
    rival = -np.inf
    best = ("", "")
    for name, window in windows(case).items():
        draws[name] = [(temperature, read_otherwise(case, one, window)) for temperature, one in found]
        pairs += [(name, base) for base in {Base(), likely}]
        top = max(score(draws[name], base) for base in {Base(), likely})
        rival, best = (top, name) if top > rival else (rival, best)
    return [*pairs, *((best, base) for base in rules)], draws


def scaled(scale: float) -> Base:
    return Base(scale=scale)


def score(found: Evidence, base: Base) -> float:
    return sum(log_likelihood(one, base.rule(temperature)) for temperature, one in found)


def codes_of(window: tuple[str, str], base: Base) -> tuple[str, ...]:
    kinds = {"twice": "probabilities-as-logits", "outside": "probabilities-as-logits", "argmax": "sampler-too-narrow"}
    ways = {"ignored": "setting-ignored", "multiplies": "setting-inverted", "squared": "setting-wrong"}
    other = "sampler-not-the-model" if base.shift or base.scale != 1 else None
    return tuple(code for code in (window[0], kinds.get(base.kind), ways.get(base.temperature), other) if code)


def explained(
    case: Case, code: str, window: tuple[str, str], base: Base, gain: float, found: Evidence
) -> dict[str, Any]:
    """Return the fields of a finding that the best explanation names."""
    n = sum(count(one) for _, one in found)
    if code in ("setting-ignored", "setting-inverted", "setting-wrong"):
        temperature = found[1][0]
        said = temperature ** {"setting-ignored": 0, "setting-inverted": -1, "setting-wrong": 2}[code]
        why = f"draws at temperature {temperature:g} are those of {said:g}"
        return setting_fault(code, "temperature", temperature, why, count(found[1][1]))
    whys = {
        "probabilities-as-logits": f"{n} draws follow the softmax of the probabilities, not of the logits",
        "sampler-too-narrow": f"all of {n} draws are the most probable id",
        "sampler-not-the-model": f"{n} draws are those of {base.scale:g} times the temperature, or of ids with "
        f"{base.shift:+d} added",
    }
    if code == window[0]:
        whys[code] = f"{n} draws follow the model's prediction after {window[1]}"
    remedies = {
        "probabilities-as-logits": "give the drawing function, such as mx.random.categorical, the logits or "
        "log-probabilities",
        "sampler-too-narrow": "draw from the softmax of the logits instead of taking their argmax",
    }
    feed = "feed the prompt and all ids drawn so far, or their cache, and draw an index of the last logits"
    right = sum(log_likelihood(one, Base().rule(temperature)) for temperature, one in case.once(evidence))
    return {
        "measured": -score(found, base) / n,
        "expected": -right / n,
        "why": f"{whys[code]} (nats per draw under this, and under the model after the text)",
        "remedy": remedies.get(code, feed),
        "evidence": {"draws": n, "nats_in_favour": gain, "reads": window[1] or "the text"},
    }


def not_off(case: Case) -> Found:
    """Leaving a setting out, or top_k = V, makes the draws the model's: its value for off is not off."""
    hot = max(temperature for temperature, _ in case.once(evidence))  # at which an argmax is no chance
    rule = Base().rule(hot)
    off = settings_off(case, **({"temperature": hot} if "temperature" in accepted(case) else {}))
    for setting in ("top_k", "top_p", "repetition_penalty"):
        rest = {name: value for name, value in off.items() if name != setting}
        for chosen in (rest, off | {"top_k": case.vocab_size}) if setting == "top_k" else (rest,):
            if setting not in off:
                continue
            found = draw_many(case, case.once(short_prompts), DRAWS[True], **chosen)
            narrow = log_likelihood(found, Base("argmax", margin=rounding(case)).rule())
            if fits(case, found, rule) and narrow - log_likelihood(found, rule) < SURE:
                why = f"{setting} = {off[setting]:g} is not off"
                return setting_fault("setting-wrong", setting, off[setting], why, count(found))
    return None


def correlated(case: Case, found: Evidence, base: Base, seeded: bool) -> Found:
    """Successive draws are dependent, or favour what the same call drew before."""
    tests = [(temperature, draws, False) for temperature, draws in found]
    if seeded:  # one text may have fallen into a loop, in which each id is certain
        chosen = {"temperature": found[-1][0]} if len(found) > 1 else {}
        prompts, P = case.once(short_prompts)[:48], case.n_positions
        texts = [draw_text(case, prompt, P, **settings_off(case, **chosen)) for prompt in prompts]
        tests.append((found[-1][0], with_logits(case, texts, len(prompts[0])), True))
    for temperature, draws, dependent in tests:
        p, favour = correlation(case, draws, base.rule(temperature), dependent)
        if p < RARE or favour > SURE:
            n = count(draws)
            return {
                "measured": p,
                "expected": "above 1e-9",
                "why": f"{n} draws depend on the draws before them in the same text, beyond what the logits say "
                f"(p-value of independence {p:.2g}; e^{favour:.0f} in favour of repeated noise)",
                "remedy": "draw new random numbers for every token: split the key, and seed once, not at every step",
                "evidence": {"draws": n, "p_value": p, "log_e_value": favour},
            }
    return None


def unexplained(case: Case, found: Evidence) -> dict[str, dict[str, Any]]:
    for temperature, draws in found:  # temperature 1 first
        if not fits(case, draws, Base().rule(temperature)):
            break
    if temperature == 1:
        return {"sampler-not-the-model": not_the_model(case, draws)}
    why = f"draws at temperature {temperature:g} are not those of the logits divided by it"
    return {"setting-wrong": setting_fault("setting-wrong", "temperature", temperature, why, count(draws))}


def not_the_model(case: Case, draws: Sequence[Draws], remark: str = "") -> dict[str, Any]:
    p, n = misfit(case, draws, Base().rule())[0], count(draws)
    return {
        "measured": p,
        "expected": "above 1e-9",
        "why": f"{n} draws with every setting off do not follow the softmax of the logits (p-value {p:.2g}){remark}",
        "remedy": "compare the logits that the sampler draws from with forward's at the last position of the same text",
        "evidence": {"draws": n, "p_value": p},
    }


def understood(case: Case) -> Verdict:
    """Return the verdict, or raise ``NotApplicable`` if further draws could not be predicted."""
    found = case.once(verdict)
    if found.base is None or (found.correlated and case.once(is_seeded)):
        raise NotApplicable("a sampler that draws from the model")
    if case.once(outside) and not found.base.shift:
        raise NotApplicable("a sampler that draws ids of the vocabulary alone")
    return found


def seen(case: Case, found: list[Draws]) -> list[Draws]:
    """Return draws with the logits after what the sampler reads, by the verdict."""
    window = understood(case).window
    return found if window is None else read_otherwise(case, found, window)


def undecided(case: Case) -> NotApplicable:
    """Return what would have to be given to decide what the draws leave open."""
    if time.monotonic() > case.once(budget)[0]:
        return NotApplicable("minutes")
    if "temperature" not in accepted(case):
        return NotApplicable("sample_settings with temperature, as the predictions are too uniform or too certain")
    return NotApplicable("a model whose predictions differ more")
