"""Sampling: draws against the softmax of the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.sampling.draws import (
    RARE,
    SURE,
    Draws,
    Rule,
    accepted,
    changed_prompts,
    contexts,
    draw_many,
    log_likelihood,
    log_softmax,
    misfit,
    of_probabilities,
    plain,
    repeats,
    settings_off,
    tempered,
)

Found = dict[str, Any] | None
Verdict = tuple[str, dict[str, Any]] | None  # code and fields of a finding
GRID = 2.0 ** np.arange(-12, 9)  # temperatures to choose from
NATS = 1.2  # entropy of a draw that tells much: a few ids are probable, most are not
LENGTH = 10  # of texts at a sharp temperature, which soon repeat themselves
DRAWS = 400  # of one evidence; 3000 where the temperature cannot be set


def short_prompts(case: Case) -> list[list[int]]:
    """Return random prompts, no longer than a quarter of the context."""
    return case.once(_short_prompts)


def _short_prompts(case: Case) -> list[list[int]]:
    return case.ids(64, max(1, min(6, case.n_positions // 4))).tolist()


def entropies(case: Case) -> np.ndarray:
    """Return the mean entropy, in nats, of the draws after some texts at each temperature of ``GRID``."""
    return np.array([entropy(log_softmax(case.once(probe_logits)[0] / temperature)) for temperature in GRID])


def entropy(logprobs: np.ndarray) -> float:
    return float(-(np.exp(logprobs) * np.maximum(logprobs, -1e9)).sum(axis=1).mean())


def probe_logits(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits (N, V) after random texts, after their last tokens alone, and after their second halves."""
    T = min(16, case.n_positions)
    texts = case.ids(4, T)
    half = T // 2
    whole = np.concatenate([contexts(case, text)[half:] for text in texts])
    alone = np.concatenate([contexts(case, text[t : t + 1]) for text in texts for t in range(half, T)])
    return whole, alone, np.concatenate([contexts(case, text[half:]) for text in texts])


def sharp_temperature(case: Case) -> float:
    """Return the temperature at which draws tell most; 1 where it cannot be set.

    Largest of the least mean divergence, in nats a draw and at most 3, from temperature 1 and from other contexts.
    """
    if "temperature" not in accepted(case):
        return 1.0
    whole, alone, half = case.once(probe_logits)
    best, found = -1.0, 1.0
    for temperature, nats in zip(GRID, case.once(entropies), strict=True):
        p = log_softmax(whole / temperature)
        others = whole, alone / temperature, half / temperature
        least = min(float(np.minimum((np.exp(p) * (p - log_softmax(other))).sum(1), 3).mean()) for other in others)
        if nats > min(0.7, 0.4 * np.log(case.vocab_size)) and temperature != 1 and least > best:
            best, found = least, float(temperature)
    return found


def broad_temperature(case: Case) -> float:
    """Return the lowest temperature from 1 on at which several ids are probable; 1 where it cannot be set."""
    if "temperature" not in accepted(case):
        return 1.0
    enough = (case.once(entropies) >= min(2.5, 0.8 * np.log(case.vocab_size))) & (GRID >= 1)
    return float(GRID[enough.argmax()] if enough.any() else GRID[-1])


def base_draws(case: Case) -> list[Draws]:
    """Draw with every setting off."""
    total = DRAWS if "temperature" in accepted(case) else 3000
    return draw_many(case, short_prompts(case), total, **settings_off(case))


def sharp_draws(case: Case) -> list[Draws]:
    """Draw at the temperature that tells most."""
    temperature = case.once(sharp_temperature)
    if temperature == 1:
        return case.once(base_draws)
    return draw_many(case, short_prompts(case), DRAWS, LENGTH, **settings_off(case, temperature=temperature))


def fits(case: Case, found: Sequence[Draws], rule: Rule) -> bool:
    """Return True if no test rejects that the draws follow the rule."""
    return misfit(case, found, rule)[0] > RARE and repeats(found, rule) < SURE


# The explanations of draws that are not those of the model, with every setting off or only the temperature set.


def verdict(case: Case) -> Verdict:
    """Return the code and the fields of what explains the draws, or None if they are the model's."""
    base, sharp, temperature = case.once(base_draws), case.once(sharp_draws), case.once(sharp_temperature)
    if found := outside_vocabulary(case, [*base, *sharp]):
        return found
    if found := always_the_most_probable(case, base):
        return not_off(case, (False, False)) or found
    right = fits(case, base, plain), fits(case, sharp, tempered(temperature))
    if found := twice_softmax(case, right):
        return found
    if found := other_context(case, right):
        return found
    if all(right):
        return None
    for test in (other_temperature, not_off, other_rule, correlated):
        if found := test(case, right):
            return found
    return unexplained(case, right)


def outside_vocabulary(case: Case, found: Sequence[Draws]) -> Verdict:
    ids = np.concatenate([one.new for one in found])
    bad = ids[(ids < 0) | (ids >= case.vocab_size)]
    if not len(bad):
        return None
    return "id-outside-vocabulary", {
        "measured": int(bad[0]),
        "expected": f"0 to {case.vocab_size - 1}",
        "why": f"{len(bad)} of {len(ids)} drawn ids are not in the vocabulary, such as {bad[0]}",
        "remedy": "draw an index of the logits' last axis, and look for logits that are NaN",
    }


def always_the_most_probable(case: Case, found: Sequence[Draws]) -> Verdict:
    """Every draw is the argmax, which chance gives with probability below e^-20."""
    drawn = [(row.max() - row[i], i) for one in found for row, i in zip(one.logits, one.new, strict=True)]
    if not drawn or max(below for below, _ in drawn) > rounding(case) or log_likelihood(found, plain) > -SURE:
        return None
    return "sampler-too-narrow", {
        "measured": 1.0,
        "expected": float(np.exp(log_likelihood(found, plain) / len(drawn))),
        "why": f"all of {len(drawn)} draws with every setting off are the most probable id",
        "remedy": "draw from the softmax of the logits instead of taking their argmax",
        "evidence": {"draws": len(drawn)},
    }


def rounding(case: Case) -> float:
    """Return a bound on how far the sampler's logits may be from forward's, as its shapes differ."""
    return case.once(_rounding)


def _rounding(case: Case) -> float:
    T = min(case.n_positions, 16)
    text = case.ids(1, T)[0]
    whole = contexts(case, text)
    alone = np.stack([contexts(case, text[: t + 1])[-1] for t in range(T)])
    scale = float(whole.std()) or 1.0
    return float(np.clip(4 * np.abs(whole - alone).max(), 1e-5 * scale, 0.05 * scale))


def twice_softmax(case: Case, right: tuple[bool, bool]) -> Verdict:
    """The softmax of the softmax explains the draws better, by 20 nats."""
    found, temperature = case.once(base_draws), 1.0
    if "temperature" in accepted(case) and not all(right):  # one at which probabilities taken as logits are not flat
        p = np.exp(log_softmax(case.once(probe_logits)[0]))
        spread = [abs(entropy(log_softmax(p / t)) - min(NATS, 0.6 * np.log(case.vocab_size))) for t in GRID]
        temperature = float(GRID[int(np.argmin(spread))])
        found = draw_many(case, short_prompts(case), 200, LENGTH, **settings_off(case, temperature=temperature))
    twice = log_likelihood(found, of_probabilities(temperature))
    once = max(log_likelihood(found, rule) for rule in (plain, tempered(temperature)))
    if twice - once < SURE or not fits(case, found, of_probabilities(temperature)):
        return None
    n = sum(len(one.new) for one in found)
    return "probabilities-as-logits", {
        "measured": -twice / n,
        "expected": -once / n,
        "why": f"{n} draws follow the softmax of the probabilities, not of the logits (nats per draw under each)",
        "remedy": "give the drawing function, such as mx.random.categorical, the logits or log-probabilities",
        "evidence": {"nats_in_favour": twice - once, "temperature": temperature},
    }


def other_context(case: Case, right: tuple[bool, bool]) -> Verdict:
    """The draws follow the model's prediction after another text than prompt and draws."""
    found, rule = case.once(sharp_draws), tempered(case.once(sharp_temperature))
    once = log_likelihood(found, rule)
    starts: dict[str, list[int] | None] = {"no prompt": [], "id 0": [0], "the last id": [-1], "its last token": None}
    if (end := case.given.get("end_of_text")) is not None:
        starts["the end of text"] = [end]
    readings: list[tuple[str, str, Callable[[Draws], Draws]]] = [
        ("prompt-ignored", f"{name} in place of the prompt", partial(restarted, case, start))
        for name, start in starts.items()
    ]
    readings.append(("prompt-ignored", "the last token alone", partial(alone, case)))
    readings.append(("sampler-not-the-model", "the text without its last token", partial(earlier, case)))
    for code, name, read in readings:
        other = [read(one) for one in found]
        same = once if len(other[0].new) == len(found[0].new) else log_likelihood([shorter(one) for one in found], rule)
        twice = log_likelihood(other, rule)
        if twice - same > SURE and fits(case, other, rule):
            n = sum(len(one.new) for one in other)
            return code, {
                "measured": -twice / n,
                "expected": -same / n,
                "why": f"{n} draws follow the model's prediction after {name} (nats per draw under it and the text)",
                "remedy": "feed the prompt and all ids drawn so far, or their cache, and use the last logits",
                "evidence": {"nats_in_favour": twice - same, "reads": name},
            }
    return None


def shorter(one: Draws) -> Draws:
    """Return the draws without the first."""
    return replace(one, n_prompt=one.n_prompt + 1, logits=one.logits[1:])


def restarted(case: Case, start: list[int] | None, one: Draws) -> Draws:
    """Return the draws with the logits that they have after another prompt; None is the prompt's last token."""
    start = [int(one.text[one.n_prompt - 1])] if start is None else [i % case.vocab_size for i in start]
    kept = one if start else shorter(one)
    text = [*start, *one.new]
    return replace(kept, logits=contexts(case, text[:-1])[-len(kept.new) :] if len(kept.new) else kept.logits)


def alone(case: Case, one: Draws) -> Draws:
    """Return the draws with the logits after the last token by itself."""
    last, where = np.unique(one.text[one.n_prompt - 1 : -1], return_inverse=True)
    return replace(one, logits=np.stack([contexts(case, [i])[0] for i in last])[where])


def earlier(case: Case, one: Draws) -> Draws:
    """Return the draws with the logits of one position before."""
    if one.n_prompt > 1:
        return replace(one, logits=contexts(case, one.text[:-2])[one.n_prompt - 2 :])
    return replace(shorter(one), logits=one.logits[:-1])


def other_temperature(case: Case, right: tuple[bool, bool]) -> Verdict:
    """The draws at a temperature are those of temperature 1, or of its inverse."""
    temperature, found = case.once(sharp_temperature), case.once(sharp_draws)
    if not right[0] or temperature == 1:
        return None
    inverse = draw_many(case, short_prompts(case), 100, LENGTH, **settings_off(case, temperature=1 / temperature))
    both = log_likelihood(found, tempered(1 / temperature)) + log_likelihood(inverse, tempered(temperature))
    if both > log_likelihood(found, plain) + log_likelihood(inverse, plain):
        code, rule, said = "setting-inverted", tempered(1 / temperature), f"{1 / temperature:g}"
    else:
        code, rule, said = "setting-ignored", plain, "1"
    if not fits(case, found, rule):
        return None
    why = f"draws at temperature {temperature:g} are those of {said}"
    return setting_fault(code, "temperature", temperature, why, found)


def other_rule(case: Case, right: tuple[bool, bool]) -> Verdict:
    """The draws are those of another temperature, or of ids that are off by one."""
    if right[0]:
        return None
    rules: dict[str, Rule] = {f"at temperature {t:.2f}": tempered(t) for t in 2.0 ** np.arange(-3, 3, 0.125) if t != 1}
    rules |= {f"with {shift:+d} added to each id": partial(shifted, shift) for shift in (1, -1)}
    found = case.once(base_draws)
    scores = {name: log_likelihood(found, rule) for name, rule in rules.items()}
    name = max(scores, key=lambda name: scores[name])
    if scores[name] - log_likelihood(found, plain) < SURE or not fits(case, found, rules[name]):
        return None
    return unexplained(case, right, f"; they are those {name}")


def shifted(shift: int, logits: np.ndarray, text: np.ndarray, n_prompt: int) -> np.ndarray:
    return log_softmax(np.roll(logits, shift, axis=1))


def setting_fault(
    code: str, setting: str, value: float, why: str, found: Sequence[Draws]
) -> tuple[str, dict[str, Any]]:
    remedies = {
        "setting-ignored": f"hand {setting} on to where the next id is drawn, and use the changed logits there",
        "setting-inverted": f"check the direction of {setting}: divide by the temperature, keep the most probable ids",
        "setting-wrong": f"check where {setting} cuts: top-k keeps k ids, top-p the fewest whose sum reaches p, and "
        "temperature 1, top_k 0 and top_p 1 are off",
    }
    n = sum(len(one.new) for one in found)
    evidence = {"setting": setting, "value": value, "draws": n}
    return code, {
        "measured": why,
        "expected": f"the draws of {setting} = {value:g}",
        "why": why,
        "remedy": remedies[code],
        "evidence": evidence,
    }


def correlated(case: Case, right: tuple[bool, bool]) -> Verdict:
    """Successive draws are dependent, or favour what the same call drew before."""
    for found, rule in (
        (case.once(base_draws), plain),
        (case.once(sharp_draws), tempered(case.once(sharp_temperature))),
    ):
        p, favour = misfit(case, found, rule)[1], repeats(found, rule)
        if len(found) > 1:  # what favours the same ids in every call is no correlation within one
            favour -= max(0.0, repeats(found, rule, across=True))
        if p < RARE or favour > SURE:
            n = sum(len(one.new) for one in found)
            return "draws-correlated", {
                "measured": p,
                "expected": "above 1e-9",
                "why": f"{n} draws depend on the draws before them in the same text, beyond what the logits say "
                f"(p-value of independence {p:.2g}; e^{favour:.0f} in favour of repeated noise)",
                "remedy": "draw new random numbers for every token: split the key, and seed once, not at every step",
                "evidence": {"draws": n, "p_value": p, "log_e_value": favour},
            }
    return None


def not_off(case: Case, right: tuple[bool, bool]) -> Verdict:
    """Leaving a setting out, or top_k = V, makes the draws the model's: its value for off is not off."""
    if right[0]:
        return None
    off = settings_off(case)
    for setting in ("top_k", "top_p", "repetition_penalty"):
        rest = {name: value for name, value in off.items() if name != setting}
        for chosen in (rest, off | {"top_k": case.vocab_size}) if setting == "top_k" else (rest,):
            if setting not in off:
                continue
            found = draw_many(case, short_prompts(case), DRAWS, **chosen)
            if fits(case, found, plain) and not always_the_most_probable(case, found):
                why = f"{setting} = {off[setting]:g} is not off"
                return setting_fault("setting-wrong", setting, off[setting], why, found)
    return None


def unexplained(case: Case, right: tuple[bool, bool], remark: str = "") -> Verdict:
    temperature, found = case.once(sharp_temperature), case.once(sharp_draws)
    if right[0]:
        why = f"draws at temperature {temperature:g} are not those of the logits divided by it"
        return setting_fault("setting-wrong", "temperature", temperature, why, found)
    found = case.once(base_draws)
    p, n = misfit(case, found, plain)[0], sum(len(one.new) for one in found)
    return "sampler-not-the-model", {
        "measured": p,
        "expected": "above 1e-9",
        "why": f"{n} draws with every setting off do not follow the softmax of the logits (p-value {p:.2g}){remark}",
        "remedy": "compare the logits that the sampler draws from with forward's at the last position of the same text",
        "evidence": {"draws": n, "p_value": p},
    }


def of_verdict(case: Case, code: str) -> Found:
    found = case.once(verdict)
    return found[1] if found is not None and found[0] == code else None


@check("prompt-changed", "sample")
def prompt_changed(case: Case) -> Found:
    """The text that is returned begins with another prompt, or the caller's list of ids changes."""
    case.once(base_draws)
    changes = case.once(changed_prompts)
    if not changes:
        return None
    what, given, became = changes[0]
    return {
        "measured": became[:16],
        "expected": given,
        "why": f"sample changed {what}",
        "remedy": "copy the prompt before appending to it, and return it whole",
        "evidence": {"times": len(changes)},
    }


@check("id-outside-vocabulary", "sample", explains=("sampler-not-the-model",))
def id_outside_vocabulary(case: Case) -> Found:
    """A drawn id is negative or not below the size of the vocabulary."""
    return of_verdict(case, "id-outside-vocabulary")


@check("sampler-too-narrow", "sample")
def sampler_too_narrow(case: Case) -> Found:
    """Every draw is the most probable id, though nothing asks for it.

    Exact: all draws with the settings off are the argmax, which has probability below e^-20 = 2e-9.
    """
    return of_verdict(case, "sampler-too-narrow")


@check("probabilities-as-logits", "sample")
def probabilities_as_logits(case: Case) -> Found:
    """The text is almost random, since the softmax is applied twice.

    Threshold: the draws are e^20 times as probable under softmax(softmax(logits) / temperature).
    """
    return of_verdict(case, "probabilities-as-logits")


@check("prompt-ignored", "sample")
def prompt_ignored(case: Case) -> Found:
    """The text does not depend on the prompt, or on more than its last token.

    Threshold: the draws are e^20 times as probable after another text, and fit its predictions.
    """
    return of_verdict(case, "prompt-ignored")


@check("draws-correlated", "sample")
def draws_correlated(case: Case) -> Found:
    """Each token is drawn with the random number of the one before.

    Pearson's chi-square of pairs of successive draws, transformed to be uniform: p below 1e-9; or an e-value of e^20
    in favour of one noise for the whole call. A sampler that gives the same text at each call is no fault.
    """
    return of_verdict(case, "draws-correlated")


@check("sampler-not-the-model", "sample")
def sampler_not_the_model(case: Case) -> Found:
    """The draws do not follow the softmax of the model's logits, and no other code explains them.

    Pearson's chi-square of the transformed draws and their pairs: p below 1e-9.
    """
    return of_verdict(case, "sampler-not-the-model")


def silent_if_wrong(case: Case) -> None:
    """Raise ``NotApplicable`` if the draws without settings are not understood as the model's."""
    found = case.once(verdict)
    if found is not None and not found[0].startswith(("setting", "draws")):
        raise NotApplicable("a sampler that draws from the model")
