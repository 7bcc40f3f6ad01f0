"""Sampling settings: greedy choice, top-k, top-p, repetition penalty, prompts of different lengths, a full context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.sampling.draws import (
    SURE,
    Draws,
    accepted,
    contexts,
    draw_many,
    log_likelihood,
    log_softmax,
    new_ids,
    penalized,
    returns_the_prompt,
    settings_off,
    tempered,
)
from mlx_gpt.check.doctor.sampling.verdict import (
    GRID,
    Found,
    Verdict,
    broad_temperature,
    entropy,
    fits,
    of_verdict,
    probe_logits,
    rounding,
    setting_fault,
    short_prompts,
    silent_if_wrong,
)

Allowed = tuple[np.ndarray, np.ndarray]  # (T, V) each: ids that a rule may keep, given rounding, and that it must keep
PENALTIES = (1.03, 1.1, 1.3, 2.0, 4.0)


def truncation(case: Case) -> Verdict:
    """Return what is wrong with the first setting that cuts elsewhere than it says."""
    silent_if_wrong(case)
    for setting, test in (("temperature", greedy_fault), ("top_k", top_k_fault), ("top_p", top_p_fault)):
        if setting in accepted(case) and (found := test(case)):
            return found
    return None


def greedy_fault(case: Case) -> Verdict:
    """Temperature 0 must take the argmax. A sampler that refuses 0 is not at fault."""
    try:
        found = draw_many(case, short_prompts(case), 60, **settings_off(case, temperature=0.0))
    except CallFailed:
        return None
    margin = rounding(case)
    allowed = [(one.logits >= one.logits.max(axis=1, keepdims=True) - margin,) * 2 for one in found]
    return cut_fault(case, "temperature", 0.0, found, allowed, 1.0)


def top_k_fault(case: Case) -> Verdict:
    """Top-k must keep the k most probable ids: all draws are among them, and the k-th is drawn too."""
    k, temperature, margin = max(1, min(3, case.vocab_size // 2)), case.once(broad_temperature), 2 * rounding(case)
    chosen = {"temperature": temperature} if "temperature" in accepted(case) else {}
    found = draw_many(case, short_prompts(case), 150, **settings_off(case, top_k=k, **chosen))
    allowed = []
    for one in found:
        ascending = np.sort(one.logits, axis=1)
        kth, after = ascending[:, -k, None], ascending[:, -k - 1, None]
        allowed.append((one.logits >= kth - margin, one.logits > after + margin))
    return cut_fault(case, "top_k", k, found, allowed, temperature)


def top_p_fault(case: Case) -> Verdict:
    """Top-p must keep the fewest most probable ids whose probabilities sum to p."""
    margin = 2 * rounding(case)
    probe = case.once(probe_logits)[0]
    p = max((0.9, 0.75, 0.6, 0.45, 0.3, 0.1), key=lambda p: last_kept(probe, nucleus(probe, p, 0.0)[1])[1].mean())
    found = draw_many(case, short_prompts(case), 300, **settings_off(case, top_p=p))
    allowed = [nucleus(one.logits, p, margin) for one in found]
    return cut_fault(case, "top_p", p, found, allowed, 1.0)


def nucleus(logits: np.ndarray, p: float, margin: float, tolerance: float = 1e-4) -> Allowed:
    """Return the ids that top-p may keep and must keep, given a tolerance of sums and a margin of logits."""
    order = np.argsort(-logits, axis=1)
    values = np.take_along_axis(logits, order, axis=1)
    before = np.cumsum(np.exp(np.take_along_axis(log_softmax(logits), order, axis=1)), axis=1)
    above = np.concatenate([np.zeros((len(values), 1)), before[:, :-1]], axis=1)  # of the more probable ids
    spread = [
        (np.searchsorted(-row, -row - margin), np.searchsorted(-row, -row + margin, "right") - 1) for row in values
    ]
    least = np.stack([row[first] for row, (first, _) in zip(above, spread, strict=True)])
    greatest = np.stack([row[last] for row, (_, last) in zip(above, spread, strict=True)])
    may, must = np.zeros_like(logits, bool), np.zeros_like(logits, bool)
    np.put_along_axis(may, order, least < p + tolerance, axis=1)
    np.put_along_axis(must, order, greatest < p - tolerance, axis=1)
    return may, must


def cut_fault(
    case: Case, setting: str, value: float, found: Sequence[Draws], allowed: Sequence[Allowed], temperature: float
) -> Verdict:
    """Return the fault of draws outside of what a setting allows, or that never reach the last that it must keep."""
    text = f"{setting} = {value:.3g}"
    outside = np.concatenate(
        [~may[np.arange(len(one.new)), one.new] for one, (may, _) in zip(found, allowed, strict=True)]
    )
    if outside.any():
        why = f"{outside.sum()} of {len(outside)} draws with {text} are not among the ids that it keeps"
        if fits(case, found, tempered(temperature)):
            return setting_fault("setting-ignored", setting, value, why + "; they are those without it", found)
        lowest = [one.logits[np.arange(len(one.new)), one.new] < np.median(one.logits, axis=1) for one in found]
        if outside.all() and np.concatenate(lowest).mean() > 0.9:
            return setting_fault("setting-inverted", setting, value, why + ", but among the least probable", found)
        return setting_fault("setting-wrong", setting, value, why, found)
    never, nats = True, 0.0  # the least probable id that must be kept is never drawn
    for one, (_, must) in zip(found, allowed, strict=True):
        last, rare = last_kept(one.logits, must, temperature)
        never &= not ((one.new == last) & (rare > 0)).any()
        nats -= float(rare.sum())
    if never and nats < -SURE:
        why = f"the last id that {text} keeps is never drawn, which chance gives with probability e^{nats:.0f}"
        return setting_fault("setting-wrong", setting, value, why, found)
    return None


def last_kept(logits: np.ndarray, must: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the least probable id that must be kept, (T,), and -log(1 - its share), 0 where it is the only one."""
    last = np.where(must, logits, np.inf).argmin(axis=1)
    shares = np.exp(log_softmax(np.where(must, logits / temperature, -np.inf)))[np.arange(len(last)), last]
    return last, np.where(must.sum(axis=1) > 1, -np.log1p(-np.minimum(shares, 0.99)), 0.0)


def of_settings(case: Case, code: str) -> Found:
    """Return the finding of a code about a setting: of the temperature, of the cuts, or of the repetition penalty."""
    if found := of_verdict(case, code):
        return found
    for find in (truncation, penalty_fault):
        cut = case.once(find)
        if cut is not None and cut[0] == code:
            return cut[1]
    return None


@check("setting-ignored", "sample", "sample_settings")
def setting_ignored(case: Case) -> Found:
    """A setting such as the temperature or top-k changes nothing.

    Exact: ids are drawn that it forbids; and by the tests of ``sampler-not-the-model`` the draws are those without it.
    """
    return of_settings(case, "setting-ignored")


@check("setting-inverted", "sample", "sample_settings")
def setting_inverted(case: Case) -> Found:
    """A setting works the other way: top-k keeps the least probable ids, a low temperature flattens."""
    return of_settings(case, "setting-inverted")


@check("setting-wrong", "sample", "sample_settings")
def setting_wrong(case: Case) -> Found:
    """A setting cuts elsewhere than it says: one id too many or too few, or its value for off is not off.

    Exact for ids that are drawn though forbidden; one that is never drawn has probability below e^-20.
    """
    return of_settings(case, "setting-wrong")


# The repetition penalty -------------------------------------------------------------------------------------------


def penalty_fault(case: Case) -> Verdict:
    """Compare the draws' likelihoods under the penalty as published, over two ranges, and under its known faults."""
    if "repetition_penalty" not in accepted(case):
        return None
    silent_if_wrong(case)
    score = dict.fromkeys((*PENALTY_RULES, "off"), 0.0)
    probes = []
    for other in ("compounds", "divides", "off"):
        prompts, penalty, temperature = penalty_probe(case, other)
        chosen = {"temperature": temperature} if "temperature" in accepted(case) else {}
        found = draw_many(
            case,
            prompts,
            300 if other == "divides" else 150,
            2,
            **settings_off(case, repetition_penalty=penalty, **chosen),
        )
        rules = {how: penalized(penalty, temperature, how) for how in PENALTY_RULES} | {"off": tempered(temperature)}
        probes.append((found, rules))
        for how, rule in rules.items():
            score[how] += log_likelihood(found, rule)
    healthy = max(score["once"], score["generated"])
    best = max(score, key=lambda how: score[how])
    code = {"off": "setting-ignored", "compounds": "penalty-compounds"}.get(best, "penalty-rewards-repetition")
    if score[best] - healthy < SURE or not all(fits(case, found, rules[best]) for found, rules in probes):
        return None
    n = sum(len(one.new) for found, _ in probes for one in found)
    whys = {
        "off": "are those without it",
        "compounds": "lower an id once for each time that it occurs",
        "divides": "divide negative logits too, which makes ids of the text more probable",
        "multiplies": "multiply positive logits too, which makes ids of the text more probable",
        "up": "make the ids of the text more probable",
    }
    return code, {
        "measured": -score[best] / n,
        "expected": -healthy / n,
        "why": f"{n} draws with a repetition_penalty {whys[best]} (nats per draw under this and the rule)",
        "remedy": "once for each id of the text, divide its logit by the penalty if positive, else multiply",
        "evidence": {"setting": "repetition_penalty", "nats_in_favour": score[best] - healthy},
    }


PENALTY_RULES = ("once", "generated", "compounds", "divides", "multiplies", "up")


def penalty_probe(case: Case, other: str) -> tuple[list[list[int]], float, float]:
    """Return prompts with repeated ids, a penalty and a temperature at which a fault is best told from the rule."""
    length = max(1, min(6, case.n_positions // 2))
    prompts = []
    for row in case.ids(16 if case.vocab_size < 5000 else 4, length):
        likely = np.argsort(-contexts(case, row)[-1])
        prompts += [np.array([*[seen] * (length - 1), row[-1]]) for seen in likely[:1]]  # repeats a probable id
        prompts += [np.array([*np.resize(likely[::-1], length - 1), row[-1]])]  # holds the least probable ids
    rows = [contexts(case, prompt)[-1:] for prompt in prompts]
    grid = GRID if "temperature" in accepted(case) else np.ones(1)
    best, found = -1.0, (prompts, PENALTIES[2], 1.0)
    for temperature in map(float, grid):
        if len(grid) > 1 and not 0.5 < entropy(log_softmax(np.concatenate(rows) / temperature)) < 3:
            continue
        for penalty in PENALTIES:
            fault = tempered(temperature) if other == "off" else penalized(penalty, temperature, other)
            once = penalized(penalty, temperature, "once")
            pairs = zip(prompts, rows, strict=True)
            nats = np.array([divergence(fault(row, ids, length), once(row, ids, length)) for ids, row in pairs])
            most = np.argsort(-nats)[:4]
            if nats[most].mean() > best:
                best, found = float(nats[most].mean()), ([prompts[i] for i in most], penalty, temperature)
    chosen, penalty, temperature = found
    return [prompt.tolist() for prompt in chosen], penalty, temperature


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of log-probabilities (1, V) in nats, at most 3."""
    return min(float((np.exp(p) * (np.maximum(p, -60) - np.maximum(q, -60))).sum()), 3.0)


@check("penalty-rewards-repetition", "sample", "sample_settings")
def penalty_rewards_repetition(case: Case) -> Found:
    """The repetition penalty makes repetition more probable, as dividing negative logits does.

    Threshold: e^20 times as probable as under the rule of Keskar et al. 2019, section 4.1, of prompt or generated text.
    """
    found = case.once(penalty_fault)
    return found[1] if found and found[0] == "penalty-rewards-repetition" else None


@check("penalty-compounds", "sample", "sample_settings")
def penalty_compounds(case: Case) -> Found:
    """The repetition penalty counts each occurrence, so that common words become impossible. Threshold as above."""
    found = case.once(penalty_fault)
    return found[1] if found and found[0] == "penalty-compounds" else None


# Prompts of different lengths, and a full context -----------------------------------------------------------------


@check("padding-differs", "sample_many")
def padding_differs(case: Case) -> Found:
    """A prompt beside longer ones gets another text than alone: padding is attended to, or shifts its positions.

    Exact at temperature 0: each new id must be the argmax of the model's logits after its own text, to rounding, as it
    is for the same prompt alone.
    """
    if case.has("sample"):
        silent_if_wrong(case)
    if "temperature" not in accepted(case):
        raise NotApplicable("sample_settings with temperature")
    lengths = sorted({1, 2, max(1, case.n_positions // 4), max(1, case.n_positions // 2)})
    n, off = max(1, min(12, case.n_positions - lengths[-1])), settings_off(case, temperature=0.0)
    for _ in range(4):
        prompts = [case.ids(1, length)[0].tolist() for length in lengths]
        together = many(case, prompts, n, off)
        for prompt, new in zip(prompts, together, strict=True):
            if below(case, prompt, new) <= rounding(case):
                continue
            (alone,) = many(case, [prompt], n, off)
            if below(case, prompt, alone) > rounding(case):
                raise NotApplicable("a sample_many whose text of one prompt is the argmax at temperature 0")
            return {
                "measured": new,
                "expected": alone,
                "why": f"a prompt of {len(prompt)} ids beside one of {lengths[-1]} gets another greedy text",
                "remedy": "pad on the left, mask the padding, and count positions from each prompt's start",
                "evidence": {"prompt": prompt, "lengths": lengths},
            }
    return None


def many(case: Case, prompts: list[list[int]], n: int, settings: dict[str, Any]) -> list[list[int]]:
    """Return the new ids of each prompt."""
    call: Callable[[], list[list[int]]] = lambda: [  # noqa: E731
        [int(i) for i in row] for row in case.given["sample_many"]([[*prompt] for prompt in prompts], n, **settings)
    ]
    rows = case.call_function("sample_many", call)
    if len(rows) != len(prompts):
        raise CallFailed("sample_many", "wrong-shape", f"sample_many returned {len(rows)} rows for {len(prompts)}")
    with_prompt = any(len(row) > n for row in rows)
    return [row[len(prompt) :] if with_prompt else row for prompt, row in zip(prompts, rows, strict=True)]


def below(case: Case, prompt: list[int], new: list[int]) -> float:
    """Return how far the logit of a new id is below the largest, at most."""
    if not new or min(new) < 0 or max(new) >= case.vocab_size:
        return 0.0 if not new else np.inf
    logits = contexts(case, [*prompt, *new[:-1]])[len(prompt) - 1 :]
    return float((logits.max(axis=1) - logits[np.arange(len(new)), new]).max())


REFUSALS = ("ValueError", "UsageError", "MLXGPTError")


@check("beyond-context", "sample")
def beyond_context(case: Case) -> Found:
    """The text goes wrong, or generation ends with an error, where it grows longer than the context.

    A sampler may stop, refuse, or read any window of the last tokens. Measured is an e-value for ids that no window of
    the text predicts. Threshold: e^20.
    """
    silent_if_wrong(case)
    case.once(returns_the_prompt)
    P = case.n_positions
    if P > 256:
        raise NotApplicable("n_positions of at most 256")
    settings = settings_off(case, **({"temperature": sharp(case)} if "temperature" in accepted(case) else {}))
    nats, stuck, n = 0.0, 0.0, 0
    for _ in range(4):
        prompt = case.ids(1, P - 1)[0].tolist()
        try:
            new = new_ids(case, prompt, 12, **settings)
        except CallFailed as failure:
            cause = failure.__cause__
            refused = isinstance(cause, ValueError) and not str(cause).startswith("[")
            if failure.code != "raises" or refused:
                raise NotApplicable("a sampler that goes on where the context is full") from None
            return beyond(f"a text of more than {P} tokens ends with {failure.message}", "an error")
        for t in range(2, len(new)):
            text = [*prompt, *new[:t]]
            windows = np.stack([contexts(case, text[-m:])[-1] for m in window_lengths(P)])
            p = np.exp(log_softmax(windows / settings.get("temperature", 1.0)))
            best = p[:, new[t]].max() if 0 <= new[t] < case.vocab_size else 0.0
            mixed = p.mean(axis=0)[new[t]] if best else 0.0
            nats += float(np.log((0.5 / case.vocab_size + 0.5 * mixed) / max(best, 1e-12)))
            n += 1
        stuck += first_window_in_favour(case, [*prompt, *new], settings.get("temperature", 1.0))
    if stuck > SURE:
        return beyond(f"the {n} ids drawn after more than {P} tokens are predicted from the first {P} of them", stuck)
    if nats < SURE:
        return None
    return beyond(f"no window of the text predicts the {n} ids drawn after more than {P} tokens", nats)


def first_window_in_favour(case: Case, text: list[int], temperature: float) -> float:
    """Return by how many nats the first tokens predict those beyond the context better than any other window does.

    Other windows have a fixed length, or a fixed start.
    """
    P, places = case.n_positions, range(case.n_positions + 1, len(text))
    if not places or min(text) < 0 or max(text) >= case.vocab_size:
        return 0.0

    def score(windows: list[list[int]]) -> float:
        logits = np.stack([contexts(case, window)[-1] for window in windows])
        return float(log_softmax(logits / temperature)[np.arange(len(places)), text[places[0] :]].sum())

    lengths = [[text[t - m : t] for t in places] for m in window_lengths(P)]
    starts = [[text[s:t] for t in places] for s in window_lengths(P) if places[-1] - s <= P and s < places[0]]
    return score([text[:P]] * len(places)) - max(map(score, lengths + starts))


def window_lengths(P: int) -> list[int]:
    return sorted(set(range(1, P + 1) if P <= 64 else [*range(1, P + 1, P // 32), P - 1, P]))


def sharp(case: Case) -> float:
    from mlx_gpt.check.doctor.sampling.verdict import sharp_temperature

    return case.once(sharp_temperature)


def beyond(why: str, measured: Any) -> dict[str, Any]:
    return {
        "measured": measured,
        "expected": "a text that stops, or goes on from a window of the last tokens",
        "why": why,
        "remedy": "read only the last n_positions tokens, text[-n_positions:], or stop where the context is full",
        "evidence": {},
    }
