"""Settings that leave out ids: temperature 0, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.sampling.contexts import Window, read_otherwise
from mlx_gpt.check.doctor.sampling.draws import Draws, accepted, new_ids, settings_off
from mlx_gpt.check.doctor.sampling.explain import Answer, Explanation, Probe, telling, weigh
from mlx_gpt.check.doctor.sampling.findings import REMEDIES, setting_fault
from mlx_gpt.check.doctor.sampling.probes import probe_draws, short_prompts, telling_temperatures
from mlx_gpt.check.doctor.sampling.rules import Base, Keep, complement, lowest, top_k, top_p, unsorted_top_p
from mlx_gpt.check.doctor.sampling.texts import rounding
from mlx_gpt.check.doctor.sampling.verdict import seen, understood

Finding = tuple[str, dict[str, Any]]  # code and fields


def cut_faults(case: Case) -> tuple[list[Finding], set[str]]:
    """Return the findings for temperature 0, top-k and top-p, and the codes that the draws leave undecided."""
    base = understood(case).base
    assert base is not None
    findings: list[Finding] = []
    undecided: set[str] = set()
    for setting, probes in (("temperature", greedy_probes), ("top_k", top_k_probes), ("top_p", top_p_probes)):
        if setting not in accepted(case) or (setting == "temperature" and base.temperature != "divides"):
            continue
        try:
            logits = np.concatenate([call.logits for call in seen(case, case.once(probe_draws))])
            chosen = telling([*probes(case, base)], [Draws(np.zeros(len(logits), int), 0, logits)])
            answer = ask(case, chosen)
        except BudgetSpent:
            undecided |= {*REMEDIES}
            continue
        except CallFailed as failure:
            if setting == "temperature":  # refuses 0
                continue
            if setting != "top_p" or failure.code != "raises" or not keeps_none(case, base):
                raise
            why = "top_p keeps no id where the most probable one has more than that probability"
            findings.append(
                ("setting-wrong", setting_fault("setting-wrong", setting, chosen[0].settings[setting], why, 0))
            )
            continue
        undecided |= answer.open
        if understood(case).correlated and not answer.fits:  # the calls may depend on each other too
            continue
        findings += cut_fault(setting, chosen[0].settings, answer)
    return findings, undecided


def ask(case: Case, probes: Sequence[Probe], n: int = 6, most: int = 480) -> Answer:
    """Draw until one explanation is left; one id per call where the draws of a call are correlated."""
    verdict = understood(case)
    rivals = [partial(otherwise, case, window) for window in verdict.rivals]
    return weigh(case, probes, lambda draws: seen(case, draws), rivals, n=1 if verdict.correlated else n, most=most)


def otherwise(case: Case, window: Window, draws: list[Draws]) -> list[Draws]:
    return read_otherwise(case, draws, window)


def cut_fault(setting: str, settings: dict[str, Any], answer: Answer) -> list[Finding]:
    """Return the finding, if any, for a setting whose draws follow a faulty rule, or no known rule."""
    value, text = settings[setting], f"{setting} = {settings[setting]:.3g}"
    if not answer.fits:
        why = f"draws with {text} follow neither the ids that it should keep nor another known rule"
        if setting == "temperature":
            why = (
                "draws with temperature = 0 are not the most probable ids, which it asks for instead of a division by 0"
            )
        return [("setting-wrong", setting_fault("setting-wrong", setting, value, why, answer.draws))]
    if not answer.best.codes:
        return []
    code = answer.best.codes[0]
    why = f"draws with {text} are those {answer.best.name}"
    return [(code, setting_fault(code, setting, value, why, answer.draws))]


def alike(base: Base) -> list[Base]:
    """Return the distributions that flat predictions do not tell apart: the temperature inside or outside a softmax."""
    kinds = ("twice", "outside") if base.kind in ("twice", "outside") else (base.kind,)
    return [replace(base, kind=kind) for kind in kinds]


def greedy_probes(case: Case, base: Base) -> Iterable[Probe]:
    """Temperature 0 takes the argmax."""
    greedy = Base("argmax", margin=rounding(case)).rule()
    rules = [Explanation("of the most probable id", greedy)]
    for like in alike(base):
        rules.append(Explanation("of a temperature near 0", like.rule(1e-4)))
        rules.append(Explanation("of temperature 1", like.rule(), ("setting-ignored",)))
    yield Probe(case.once(short_prompts), settings_off(case, temperature=0.0), rules)


def top_k_probes(case: Case, base: Base) -> Iterable[Probe]:
    """Top-k keeps the k most probable ids."""
    margin = 2 * rounding(case)
    for k in {min(3, max(1, case.vocab_size - 1)), 1} - ({1} if case.vocab_size > 2 else set()):
        cuts = {"": top_k(k, margin), "of one id more": top_k(k + 1, margin)}
        if k > 1:
            cuts["of one id less"] = top_k(k - 1, margin)
        yield from cut_probes(case, base, {"top_k": k}, cuts, ("before",))


def top_p_probes(case: Case, base: Base) -> Iterable[Probe]:
    """Top-p keeps the fewest most probable ids whose probabilities sum to p, before or after the temperature."""
    margin = 2 * rounding(case)
    for p in (0.9, 0.6, 0.3):
        cuts = {"": top_p(p, margin), "of one id more": top_p(p, margin, 1), "of one id less": top_p(p, margin, -1)}
        cuts["of the first ids by number, not by probability"] = unsorted_top_p(p)
        yield from cut_probes(case, base, {"top_p": p}, cuts, ("before", "after"))


def keeps_none(case: Case, base: Base) -> bool:
    """Return True if top-p raises wherever the most probable id has more than that probability, and only there."""
    t = case.once(telling_temperatures)[0]
    chosen = {"temperature": t} if "temperature" in accepted(case) else {}
    raised = []
    for call in seen(case, case.once(probe_draws)[:6]):
        largest = float(np.exp(base.rule(t)([call])).max())
        for p in (0.9 * largest, 0.5 + 0.5 * largest):
            try:
                new_ids(case, call.text[:-1].tolist(), 1, **settings_off(case, **chosen, top_p=p))
                raised.append(False)
            except CallFailed:
                raised.append(True)
    return all(raised[::2]) and not any(raised[1::2])


def cut_probes(
    case: Case, base: Base, setting: dict[str, Any], cuts: dict[str, Keep], orders: Sequence[str]
) -> Iterable[Probe]:
    """Yield the right and the faulty explanations of a cut, at each of the temperatures that tell most."""
    orders = [*orders, "first", "last"] if base.kind != "softmax" else orders
    inverted = [("of the least probable ids", lowest(cuts[""]))]
    inverted += [
        ("of what it should drop", complement(keep)) for name, keep in cuts.items() if name in ("", "of one id less")
    ]
    faults = [("setting-wrong" if name else "", name, keep) for name, keep in cuts.items()]
    faults += [("setting-inverted", name, keep) for name, keep in inverted]
    for t in case.once(telling_temperatures):
        explanations = []
        for like in alike(base):
            explanations.append(Explanation("without it", like.rule(t), ("setting-ignored",)))
            for cut, (code, name, keep) in product(orders, faults):
                explanations.append(Explanation(name, like.rule(t, keep, cut=cut), (code,) if code else ()))
            for cut in orders:
                zeroed = like.rule(t, cuts[""], cut=cut, dropped=0.0)
                explanations.append(Explanation("of 0, not -inf, as the other logits", zeroed, ("setting-wrong",)))
                if case.vocab_size > 2:  # of two ids, one is kept
                    equal = replace(like, kind="uniform").rule(t, cuts[""], cut=cut)
                    explanations.append(Explanation("of the ids kept, all equally probable", equal, ("setting-wrong",)))
        chosen = {"temperature": t} if "temperature" in accepted(case) else {}
        yield Probe(case.once(short_prompts), settings_off(case, **setting, **chosen), explanations)
