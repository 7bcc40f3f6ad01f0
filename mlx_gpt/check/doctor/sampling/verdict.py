"""Decide what the sampler reads and draws from, with every setting off or only the temperature set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable
from mlx_gpt.check.doctor.sampling.by_cache import follows_cache
from mlx_gpt.check.doctor.sampling.certain import certain
from mlx_gpt.check.doctor.sampling.contexts import TEXT, Named, Window, read_otherwise, windows
from mlx_gpt.check.doctor.sampling.draws import (
    Draws,
    accepted,
    budget,
    count,
    draw_many,
    ids_of,
    is_seeded,
    outside,
    settings_off,
)
from mlx_gpt.check.doctor.sampling.evidence import (
    DRAWS,
    SCALES,
    Candidate,
    Evidence,
    Scores,
    codes_of,
    evidence,
    in_turn,
    predicted,
)
from mlx_gpt.check.doctor.sampling.explain import DECIDED, Explanation, choose, log_likelihood
from mlx_gpt.check.doctor.sampling.findings import drawing_fault, setting_fault
from mlx_gpt.check.doctor.sampling.fit import RARE, ROUNDED, SURE, UNSURE, correlation, fits, misfit, sound
from mlx_gpt.check.doctor.sampling.probes import entropy, short_prompts
from mlx_gpt.check.doctor.sampling.rules import Base
from mlx_gpt.check.doctor.sampling.training_mode import of_training_mode

OF_UNIFORM = 10.0  # nats that uniform draws cost: two softmaxes of many ids are almost uniform, and more usual
WHOLE = 6.0  # nats of ``log_share``, about 1 of draws that lack no id: less with probability e^-6


@dataclass(frozen=True)
class Verdict:
    """Findings by code, codes that are not excluded, and the distribution and text of further draws, where known."""

    findings: dict[str, dict[str, Any]]
    open: set[str] = field(default_factory=set)
    base: Base | None = None
    window: Window | None = None
    rivals: Sequence[Window] = ()  # texts that it may read as well, by the draws so far

    @property
    def correlated(self) -> bool:
        return "draws-correlated" in self.findings


def verdict(case: Case) -> Verdict:
    """Return the simplest explanation of the draws: the text that is read, and the distribution drawn from."""
    seeded = case.once(is_seeded)
    if seeded and (findings := certain(case, case.once(evidence))):
        wrong = not_off(case)
        return Verdict({"setting-wrong": wrong} if wrong else findings)
    for scores, draws in in_turn(case):
        (read, base), gain, left = best_of(scores)
        codes, seen, texts = codes_of(read, base), draws[read], draws[TEXT]
        if not left - {*codes}:
            break
    right = all(fits(case, calls, base.rule(temperature)) for temperature, calls in seen)
    if follows_cache(case, texts):
        return Verdict({})
    if (base.other or not right) and not seeded:
        best = scores[read, base] - scores[TEXT, Base()]
        if fields := of_training_mode(case, texts, best):
            return Verdict({"sampler-not-the-model": fields})
    if "sampler-too-narrow" in codes or base.other:
        with suppress(BudgetSpent):  # without more draws the fault is named as it seems
            if wrong := not_off(case):
                return Verdict({"setting-wrong": wrong})
    may_be_uniform = "sampler-not-the-model" in left
    findings = {code: explained(code, read, base, gain, seen, texts, may_be_uniform) for code in codes}
    dependent = None if right and not seeded else correlated(case, seen, base, seeded)
    window = windows(case)[read] if read[1] else None
    if right and not dependent:
        near = {name for (name, _), value in scores.items() if value > scores[read, base] - DECIDED}
        rivals = [windows(case)[name] for name in near if name[1] and name != read]
        return Verdict(findings, left - {*codes}, base if base.kind != "argmax" else None, window, rivals)
    if dependent and (seeded or first_fit(case, texts, Base())):  # so few numbers fit other explanations by chance
        return Verdict({"draws-correlated": dependent}, left - {*codes}, Base(), None)
    if dependent and "sampler-not-the-model" not in codes and first_fit(case, seen, base):
        return Verdict(findings | {"draws-correlated": dependent}, left - {*codes}, base, window)
    if wrong := not_off(case):
        return Verdict({"setting-wrong": wrong})
    return Verdict(unexplained(case, texts))


def best_of(scores: Scores) -> tuple[Candidate, float, set[str]]:
    """Return the best candidate, its gain over the best right one, and the codes that are not excluded."""
    named = [
        Explanation(read[1], base.rule(), codes_of(read, base), cost=OF_UNIFORM if base.kind == "uniform" else 0.0)
        for read, base in scores
    ]
    best, gain, left = choose([*scores.values()], named)
    return [*scores][best], gain, left


def explained(
    code: str, read: Named, base: Base, gain: float, drawn: Evidence, texts: Evidence, may_be_uniform: bool
) -> dict[str, Any]:
    """Return the fields of a finding of the best explanation.

    ``drawn``: with the logits after the text ``read``; ``texts``: after the right text.
    """
    every = [call for _, calls in drawn for call in calls]
    n = count(every)
    if code in ("setting-ignored", "setting-inverted", "setting-wrong"):
        temperature, calls = drawn[1]
        said = temperature ** {"setting-ignored": 0, "setting-inverted": -1, "setting-wrong": 2}[code]
        why = f"draws at temperature {temperature:g} are those of {said:g}"
        return setting_fault(code, "temperature", temperature, why, count(calls))
    whys = {
        "probabilities-as-logits": f"{n} draws follow the softmax of the probabilities, not of the logits"
        + (", or are uniform, which for so many ids is almost the same" if may_be_uniform else ""),
        "sampler-too-narrow": f"all of {n} draws are the most probable id",
        "sampler-not-the-model": f"{n} draws are " + drawn_from(base),
    }
    if code == read[0]:
        whys[code] = f"{n} draws follow the model's prediction after {read[1]}"
    right = predicted(texts, Base())
    surprise = -sum(log_likelihood(calls, rule) for calls, rule in right) / n
    expected = sum(entropy(rule(calls)) * count(calls) for calls, rule in right) / n
    likelihoods = f"is {surprise:.3g} nats per token, that of its own draws {expected:.3g}"
    why = f"{whys[code]}; their negative log-likelihood under the model {likelihoods}"
    return drawing_fault(code, why, surprise, every, expected, nats_in_favour=gain, reads=read[1] or "the text")


def drawn_from(base: Base) -> str:
    if base.kind == "uniform":
        return "uniform over all ids"
    if base.shift:
        return f"those of the model with {base.shift:+d} added to the id"
    return f"those of {base.scale:g} times the temperature"


def not_off(case: Case) -> Found:
    """Return the finding for a setting whose value for off is not off, None if there is none.

    The draws follow the model once the setting is left out, or with top_k = V or top_p just below 1. With top-k and
    top-p the draws before must lack the less probable ids.
    """
    hot, drawn = min(case.once(evidence), key=lambda pair: log_share(*pair))  # where most is cut
    rule, lacks = Base().rule(hot), log_share(hot, drawn) < -SURE
    if not lacks and fits(case, drawn, rule):
        return None
    nearly: dict[str, dict[str, float]] = {"top_k": {"top_k": case.vocab_size}, "top_p": {"top_p": 1 - 1e-4}}
    off = settings_off(case, **({"temperature": hot} if "temperature" in accepted(case) else {}))
    for setting in ("top_k", "top_p") if lacks else ("repetition_penalty",):
        rest = {name: value for name, value in off.items() if name != setting}
        for chosen in (rest, off | nearly.get(setting, {})) if setting in off else ():
            calls = draw_many(case, case.once(short_prompts), max(DRAWS[True], count(drawn)), **chosen)
            if sound(case, calls, rule) and log_share(hot, calls) > -WHOLE:
                why = f"{setting} = {off[setting]:g} is not off"
                return setting_fault("setting-wrong", setting, off[setting], why, count(calls))
    return None


def log_share(temperature: float, calls: Sequence[Draws]) -> float:
    """Return the log-probability that draws from the model have no less probable ids than these.

    The least probable id of these is found by its rank, as for top-k, and by the sum of more probable ones, as for
    top-p; the lower of both.
    """
    p, ids = np.exp(Base().rule(temperature)(calls)), ids_of(calls)
    own = p[np.arange(len(ids)), ids][:, None]
    ordered = -np.sort(-p, axis=1)
    before = ordered.cumsum(axis=1) - ordered
    by_number = np.arange(p.shape[1]) <= (p > own).sum(axis=1).max()
    by_sum = before <= np.where(p > own, p, 0).sum(axis=1).max() + ROUNDED
    return float(min(np.log((ordered * kept).sum(axis=1)).sum() for kept in (by_number, by_sum)))


def correlated(case: Case, drawn: Evidence, base: Base, seeded: bool) -> Found:
    """Return the finding for draws that depend on earlier draws of the same call."""
    tests = [(temperature, draws[:1] if seeded else draws, False) for temperature, draws in drawn]
    if seeded:  # the first text may be a loop, in which each id is certain
        tests += [(temperature, draws, True) for temperature, draws in drawn]
    for temperature, draws, dependent in tests:
        p, favour = correlation(case, draws, base.rule(temperature), dependent)
        why = f"{count(draws)} draws depend on the draws before them in the same text, beyond what the logits say"
        values = {"p_value": p, "log_e_value": favour}
        if p < RARE:
            why += " (p-value of independence)"
            return drawing_fault("draws-correlated", why, p, draws, f"above {RARE:g}", **values)
        if favour > SURE:
            why += " (nats in favour of one noise or number for all of them)"
            return drawing_fault("draws-correlated", why, favour, draws, f"below {SURE:g}", **values)
    return None


def first_fit(case: Case, drawn: Evidence, base: Base) -> bool:
    """Return True if the first draw of each call, which cannot depend on others, follows the distribution."""
    return all(
        misfit(case, list(map(first_of, calls)), base.rule(temperature))[0] > RARE for temperature, calls in drawn
    )


def first_of(call: Draws) -> Draws:
    read = None if call.read is None else call.read[:1]
    return Draws(call.text[: call.n_prompt + 1], call.n_prompt, call.logits[:1], read)


def unexplained(case: Case, drawn: Evidence) -> dict[str, dict[str, Any]]:
    """Return the finding for draws that fit no known explanation."""
    for temperature, draws in drawn:  # temperature 1 first
        if not fits(case, draws, Base().rule(temperature)):
            break
    at_one = temperature == 1
    if not at_one:  # draws at temperature 1 may show it too
        more = draw_many(case, case.once(short_prompts), DRAWS[False], **settings_off(case))
        at_one = misfit(case, more, Base().rule())[0] < UNSURE
    if at_one or not any(sound(case, draws, Base(scale=scale).rule(temperature)) for scale in SCALES):
        p, n = misfit(case, draws, Base().rule(temperature))[0], count(draws)
        off = "every setting off" if temperature == 1 else f"every setting off but temperature {temperature:g}"
        why = f"{n} draws with {off} do not follow the softmax of the logits (p-value {p:.2g})"
        fields = drawing_fault("sampler-not-the-model", why, p, draws, "above 1e-9", p_value=p)
        remedy = "compare the logits that the sampler draws from with forward's at the last position of the same text"
        return {"sampler-not-the-model": fields | {"remedy": remedy}}
    why = f"draws at temperature {temperature:g} are not those of the logits divided by it"
    return {"setting-wrong": setting_fault("setting-wrong", "temperature", temperature, why, count(draws))}


def understood(case: Case) -> Verdict:
    """Return the verdict, or raise ``NotApplicable`` if further draws could not be predicted."""
    decided = case.once(verdict)
    if decided.base is None or decided.base.other or (decided.correlated and case.once(is_seeded)):
        raise NotApplicable("a sampler that draws from the model")
    if case.once(outside):
        raise NotApplicable("a sampler that draws ids of the vocabulary alone")
    return decided


def seen(case: Case, calls: list[Draws]) -> list[Draws]:
    """Return draws with the logits after what the sampler reads, by the verdict."""
    window = understood(case).window
    return calls if window is None else read_otherwise(case, calls, window)


def undecided(case: Case) -> NotApplicable:
    """Return the exception that says what is needed to decide what the draws leave open."""
    if time.monotonic() > case.once(budget)[0]:
        return NotApplicable("minutes")
    if case.once(is_seeded):
        return NotApplicable("a sample that draws another text at each call")
    if "temperature" not in accepted(case):
        return NotApplicable("sample_settings with temperature, as the predictions are too uniform or too certain")
    return NotApplicable("a model whose predictions differ more between texts")
