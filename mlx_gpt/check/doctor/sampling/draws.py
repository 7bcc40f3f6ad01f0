"""Draws of the user's sampler, their probabilities by the model's logits, and tests of one against the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable

OFF: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SURE = 20.0  # nats by which an explanation must be the better one: false alarm below exp(-20) = 2e-9
RARE = 1e-9  # p-value of a chi-square test that is a finding; a tenth is left for the error of the approximation
SECONDS = 3.0  # for the draws of one evidence; a slow sampler gives fewer
Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # logits (T, V), text, n_prompt -> log-probabilities (T, V)


@dataclass(frozen=True)
class Draws:
    """One call: the text (prompt and new ids), and the model's logits before each new id, (n, V) float64."""

    text: np.ndarray
    n_prompt: int
    logits: np.ndarray
    settings: dict[str, Any]

    @property
    def new(self) -> np.ndarray:
        return self.text[self.n_prompt :]


def settings_off(case: Case, **changed: Any) -> dict[str, Any]:
    """Return every known setting that ``sample`` accepts, off, and those to change."""
    return {name: value for name, value in OFF.items() if name in accepted(case)} | changed


def accepted(case: Case) -> set[str]:
    return set(case.given.get("sample_settings") or ())


def new_ids(case: Case, prompt: Sequence[int], n: int, **settings: Any) -> list[int]:
    """Return the new ids of one call of ``sample``, without the prompt. Records a prompt that was changed."""
    returns_prompt = case.once(returns_the_prompt)
    given = [int(i) for i in prompt]
    ids = call_sample(case, given, n, **settings)
    if len(ids) > n + (len(prompt) if returns_prompt else 0):
        raise CallFailed("sample", "wrong-shape", f"sample returned {len(ids)} ids for {len(prompt)} and {n} new ones")
    changes = case.once(changed_prompts)
    if given != list(prompt):
        changes.append(("its argument", list(prompt), given))
    if not returns_prompt:
        return ids
    if ids[: len(prompt)] != list(prompt):
        changes.append(("the prompt it returned", list(prompt), ids[: len(prompt)]))
    return ids[len(prompt) :]


def changed_prompts(case: Case) -> list[tuple[str, list[int], list[int]]]:
    return []


def call_sample(case: Case, ids: list[int], n: int, **settings: Any) -> list[int]:
    result = case.call_function("sample", lambda: as_numpy(case.given["sample"](ids, n, **settings)))
    if result.ndim == 2 and len(result) == 1:  # a batch of one
        (result,) = result
    if result.ndim != 1 or (result.size and result.dtype.kind not in "iu"):
        raise CallFailed("sample", "wrong-shape", f"sample returned shape {result.shape}; expected ids (n,)")
    return result.tolist()


def returns_the_prompt(case: Case) -> bool:
    """Tell a result of new ids from one of prompt and new ids, by their number."""
    n_prompt = min(3, case.n_positions - 1)
    prompts = case.ids(4, n_prompt).tolist()
    lengths = [len(call_sample(case, list(prompt), 1, **settings_off(case))) for prompt in prompts if n_prompt > 1]
    return max(lengths, default=0) > 1


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def contexts(case: Case, text: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the logits after each prefix of a text, (T, V) float64; ids outside the vocabulary count as 0."""
    ids = np.asarray(text)
    inside = np.where((ids >= 0) & (ids < case.vocab_size), ids, 0)
    return case.logits(inside[None])[0].astype(np.float64)


def draw(case: Case, prompt: Sequence[int], n: int, **settings: Any) -> Draws:
    """Call ``sample`` once, within the context."""
    n = min(n, case.n_positions - len(prompt))
    new = new_ids(case, prompt, n, **settings)
    if len(new) < n and (end := case.given.get("end_of_text")) is not None and (not new or new[-1] != end):
        new.append(int(end))  # the sampler drew it and kept it back
    text = np.array([*prompt, *new], np.int64)
    logits = contexts(case, text[:-1])[len(prompt) - 1 :] if new else np.zeros((0, case.vocab_size))
    return Draws(text, len(prompt), logits, settings)


def draw_many(case: Case, prompts: Sequence[Sequence[int]], total: int, n: int = 10**9, **settings: Any) -> list[Draws]:
    """Call ``sample`` with the prompts in turn until there are ``total`` draws or the time is over.

    One call only where equal calls give equal texts: their draws are no more than those of one.
    """
    found: list[Draws] = []
    end = time.monotonic() + min(SECONDS, case.seconds_left() / 20)
    n = 10**9 if case.once(is_seeded) else n
    for call in range(total):
        one = draw(case, prompts[call % len(prompts)], n, **settings)
        found += [one] if len(one.new) else []  # a text may end at once
        enough = sum(len(one.new) for one in found) >= total or case.once(is_seeded)
        if (found and enough) or time.monotonic() > end:
            break
    if not found:
        raise NotApplicable("a sampler that returns ids")
    return found


def is_seeded(case: Case) -> bool:
    """Detect that equal calls give equal texts, though the model makes that improbable."""
    settings = settings_off(case, **({"temperature": 4.0} if "temperature" in accepted(case) else {}))
    nats = 0.0
    for prompt in case.ids(8, max(1, min(6, case.n_positions // 4))).tolist():
        one, two = (draw(case, prompt, 64, **settings) for _ in range(2))
        if not np.array_equal(one.text, two.text):
            return False
        nats += log_likelihood([one], tempered(settings.get("temperature", 1.0)))
        if nats < -SURE:
            return True
    return False


# Rules ------------------------------------------------------------------------------------------------------------


def plain(logits: np.ndarray, text: np.ndarray, n_prompt: int) -> np.ndarray:
    return log_softmax(logits)


def tempered(temperature: float) -> Rule:
    return lambda logits, text, n_prompt: log_softmax(logits / temperature)


def of_probabilities(temperature: float = 1.0) -> Rule:
    """Softmax applied twice."""
    return lambda logits, text, n_prompt: log_softmax(np.exp(log_softmax(logits)) / temperature)


def penalized(penalty: float, temperature: float, how: str) -> Rule:
    """Apply a repetition penalty: "once" is Keskar et al. 2019, section 4.1; the others are faults or other ranges."""

    def rule(logits: np.ndarray, text: np.ndarray, n_prompt: int) -> np.ndarray:
        changed = logits.copy()
        for t, row in enumerate(changed):
            seen = text[n_prompt if how == "generated" else 0 : n_prompt + t]
            ids, counts = np.unique(seen, return_counts=True)
            strength = penalty ** (counts if how == "compounds" else np.ones(len(ids)))
            values = row[ids]
            down = np.where(values < 0, values * strength, values / strength)
            up = np.where(values < 0, values / strength, values * strength)
            row[ids] = {"divides": values / strength, "multiplies": values * strength, "up": up}.get(how, down)
        return log_softmax(changed / temperature)

    return rule


# Tests ------------------------------------------------------------------------------------------------------------


def log_likelihood(found: Sequence[Draws], rule: Rule) -> float:
    """Return the log-likelihood of all draws in nats, where no draw counts as less than e^-50."""
    total = 0.0
    for one in found:
        logprobs = rule(one.logits, one.text, one.n_prompt)
        total += float(np.maximum(chosen(logprobs, one.new), -50).sum())
    return total


def chosen(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the log-probability of each id; -inf outside the vocabulary."""
    inside = (ids >= 0) & (ids < logprobs.shape[1])
    return np.where(inside, logprobs[np.arange(len(ids)), np.where(inside, ids, 0)], -np.inf)


def uniforms(case: Case, found: Sequence[Draws], rule: Rule, ranked: bool) -> list[np.ndarray]:
    """Return each draw's place in its cumulative distribution, at random within its own share: uniform if it is true.

    Randomized probability integral transform. ``ranked`` orders the ids by probability, else by number.
    """
    places = []
    for one in found:
        p = np.exp(rule(one.logits, one.text, one.n_prompt))
        inside = np.clip(one.new, 0, case.vocab_size - 1)
        own = p[np.arange(len(p)), inside]
        numbers = np.arange(p.shape[1])[None]
        ties = (p == own[:, None]) & (numbers < inside[:, None])
        before = (p > own[:, None]) | ties if ranked else numbers < inside[:, None]
        places.append((p * before).sum(axis=1) + own * case.rng.random(len(own)))
    return places


def misfit(case: Case, found: Sequence[Draws], rule: Rule) -> tuple[float, float]:
    """Return p-values of the draws under a rule: of all tests, and of the independence of successive draws alone.

    The ids are ordered by probability and by number; each order gives two tests.
    """
    tests = [p_values(uniforms(case, found, rule, ranked)) for ranked in (True, False)]
    independent = min(1.0, 2 * min(pair for _, pair in tests))
    return min(1.0, 4 * min(min(one) for one in tests)), independent


def p_values(places: Sequence[np.ndarray]) -> tuple[float, float]:
    """Test places of draws for uniformity, and successive ones for independence, in 5 x 5 cells (3 x 3 below 250).

    Pearson's chi-square; 1 below 40 pairs.
    """
    places = [place for place in places if len(place)]
    every = np.concatenate(places) if places else np.zeros(0)
    K = 5 if len(every) >= 250 else 3
    uniform = pair = 1.0
    if (N := len(every)) >= 40:
        singles = np.bincount(bins(every, K), minlength=K)
        uniform = chi_square(float(np.square(singles - N / K).sum() * K / N), K - 1)
    cells = np.zeros((K, K))
    for place in places:
        np.add.at(cells, (bins(place[:-1], K), bins(place[1:], K)), 1)
    if (N := int(cells.sum())) >= 40:
        expected = np.outer(cells.sum(axis=1), cells.sum(axis=0)) / N
        statistic = float((np.square(cells - expected) / np.maximum(expected, 1e-9)).sum())
        pair = chi_square(statistic, (K - 1) ** 2)
    return uniform, pair


def repeats(found: Sequence[Draws], rule: Rule, across: bool = False) -> float:
    """Return the log of an e-value for draws of a call that favour the ids which the call drew already.

    As one noise for every step gives, with which argmax(logits + noise) chooses. Each draw's alternative is half the
    rule and half the rule with an id weighed by (times drawn + 1/2) / (times expected + 1/2). Above x with probability
    below e^-x if the draws follow the rule and are independent (Ville 1939). ``across`` counts over all calls.
    """
    total = 0.0
    drawn = expected = np.zeros(0)
    for one in found:
        p = np.exp(rule(one.logits, one.text, one.n_prompt))
        if not (across and len(drawn)):
            drawn, expected = np.full(p.shape[1], 0.5), np.full(p.shape[1], 0.5)
        for row, i in zip(p, one.new, strict=True):
            if not 0 <= i < len(row):
                continue
            weighed = row * drawn / expected
            ratio = weighed[i] / weighed.sum() / max(row[i], 1e-300)
            total += log(0.5 + 0.5 * min(ratio, 1e9))
            drawn[i] += 1
            expected += row
    return total


def bins(places: np.ndarray, K: int) -> np.ndarray:
    return np.clip((places * K).astype(int), 0, K - 1)


def chi_square(statistic: float, freedom: int) -> float:
    """Return the upper tail of the chi-square distribution, of an even number of degrees of freedom (closed form)."""
    term = total = 1.0
    for i in range(1, freedom // 2):
        term *= statistic / 2 / i
        total += term
    return exp(max(-700.0, log(total) - statistic / 2))
