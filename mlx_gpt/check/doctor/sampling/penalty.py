"""Compare the repetition penalty with the published rule and its known faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.probes import own_text_or_random
from mlx_gpt.check.doctor.sampling.cuts import Finding, ask
from mlx_gpt.check.doctor.sampling.draws import accepted, draw_many, settings_off
from mlx_gpt.check.doctor.sampling.explain import Answer, Explanation, Probe, telling, telling_settings
from mlx_gpt.check.doctor.sampling.findings import setting_fault
from mlx_gpt.check.doctor.sampling.probes import after_prompts, n_texts, telling_temperatures
from mlx_gpt.check.doctor.sampling.rules import Base, Change, of_logprobs, penalized
from mlx_gpt.check.doctor.sampling.texts import logits_after
from mlx_gpt.check.doctor.sampling.verdict import seen, understood

PENALTIES = (1.1, 1.3, 2.0, 4.0)
MOST = 12  # prompts of a kind
TIMES = 5  # that an id occurs in prompts of one id
LONG = 40  # ids of a text whose prompt is not read
LONGEST = 16  # ids of a prompt, so that some of a text occur several times
WHYS = {
    "setting-ignored": "are those without it",
    "penalty-compounds": "lower an id once for each time that it occurs",
    "penalty-rewards-repetition": "make ids of the text more probable",
}


def penalty_prompts(case: Case) -> list[list[int]]:
    """Return prompts of one repeated id that is likely to come again, of the user's text, and of improbable ids."""
    length = max(1, min(LONGEST, case.n_positions // 2))
    same = case.ids(16 * case.once(n_texts), length)
    same[:, -TIMES - 1 : -1] = repeated = case.ids(len(same), 1)
    same[::4, -1:] = repeated[::4]
    again = logits_after(case, same)
    likely = np.argsort(again.max(axis=1) - np.take_along_axis(again, repeated, axis=1)[:, 0])[:MOST]
    starts = case.ids(min(MOST, case.once(n_texts)), length)
    unlikely = np.argsort(logits_after(case, starts), axis=1)
    mixed = [[*np.resize(ids[:length], length - 1), row[-1]] for ids, row in zip(unlikely, starts, strict=True)]
    return [[int(i) for i in prompt] for prompt in [*same[likely], *own_text_or_random(case, MOST, length), *mixed]]


def explanations(base: Base, temperature: float, penalty: float, of_ids: Sequence[str]) -> list[Explanation]:
    """Return the right rules, for the ids of each text, on logits or log-probabilities, and their known faults."""

    def of(change: Change | None, *codes: str) -> Explanation:
        return Explanation(ids, base.rule(temperature, change=change), codes, shows=ids == of_ids[-1])

    rules = []
    for ids in of_ids:
        right = penalized(penalty, "lowers", ids)
        rules += [of(right), of(of_logprobs(right))]
        rules.append(of(penalized(penalty, "lowers", ids, "each"), "penalty-compounds"))
        for how in ("divides", "multiplies", "raises"):
            rules.append(of(penalized(penalty, how, ids), "penalty-rewards-repetition"))
        rules.append(of(of_logprobs(penalized(penalty, "divides", ids)), "penalty-rewards-repetition"))
    return [*rules, of(None, "setting-ignored")]


def penalty_probes(case: Case, base: Base) -> Iterable[Probe]:
    with_temperature = "temperature" in accepted(case)
    of_ids = ("new", "text") if understood(case).window is None else ("new", "text", "read")
    for t in sorted({1.0, *case.once(telling_temperatures)}):
        for penalty in PENALTIES:
            chosen = {"repetition_penalty": penalty, **({"temperature": t} if with_temperature else {})}
            settings = settings_off(case, **chosen)
            yield Probe(case.once(penalty_prompts), settings, explanations(base, t, penalty, of_ids))


def penalty_faults(case: Case) -> tuple[list[Finding], set[str]]:
    """Return the findings for the repetition penalty, and the codes that the draws leave undecided."""
    if "repetition_penalty" not in accepted(case):
        raise NotApplicable("sample_settings with repetition_penalty")
    base = understood(case).base
    assert base is not None
    if base.shift:
        return [], {*WHYS} - {"setting-ignored"}
    try:
        if understood(case).window is None:
            probes = telling([*penalty_probes(case, base)], seen(case, after_prompts(case, case.once(penalty_prompts))))
            answer = ask(case, probes, n=3)
        else:  # the prompt may not be read, so that only new ids are repeated
            n, prompts = min(LONG, case.n_positions - 1), case.ids(32, 1).tolist()
            rows = seen(case, draw_many(case, prompts, 4 * n, n, **settings_off(case)))
            probes = [
                replace(probe, prompts=prompts) for probe in telling_settings([*penalty_probes(case, base)], rows)
            ]
            answer = ask(case, probes, n, most=3000)
    except BudgetSpent:
        return [], {*WHYS}
    if not answer.fits:  # another rule
        return [], {*WHYS}
    if not answer.best.codes:
        return [], answer.open
    code, value = answer.best.codes[0], probes[0].settings["repetition_penalty"]
    why = f"draws with repetition_penalty = {value:g} {WHYS[code]}"
    return [(code, penalty_finding(code, value, why, answer))], answer.open


def penalty_finding(code: str, value: float, why: str, answer: Answer) -> dict[str, Any]:
    finding = setting_fault("setting-ignored", "repetition_penalty", value, why, answer.draws)
    if code != "setting-ignored":
        finding["remedy"] = "once for each id of the text, divide its logit by the penalty if positive, else multiply"
    finding["evidence"]["nats_in_favour"] = answer.gain
    return finding
