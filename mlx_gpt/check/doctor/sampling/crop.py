"""Samplers that read only the last tokens of a prompt, found by greedy draws after long prompts."""

from __future__ import annotations

import time

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.probes import own_text_or_random
from mlx_gpt.check.doctor.sampling.draws import accepted, budget, inside, new_ids, settings_off
from mlx_gpt.check.doctor.sampling.texts import below, logits_after, rounding

LONGEST = 64  # ids of a prompt
PROMPTS, AMONG = 24, 96  # prompts, and how many they are chosen from at most
NUMBERS = 2e6  # logits of the prompts to choose from, at most
DIFFERENT = 8  # times the rounding, by which a draw's logit must be below the largest to be another id


def tokens_read(case: Case) -> int | None:
    """Return how many of a prompt's last tokens are read, if not all of them; None if all are, or it is unknown.

    Exact, at temperature 0 or top-k 1: all draws are the argmax after that many tokens, within rounding, and at least
    one is not the argmax after the whole prompt.
    """
    if case.vocab_size < 2:
        return None
    length = max(1, min(LONGEST, case.n_positions - 1))
    among = int(np.clip(NUMBERS // (length * case.vocab_size), PROMPTS, AMONG))
    prompts = telling_prompts(case, length, among)
    drawn = greedy(case, prompts)
    if drawn is None or below(case, prompts, drawn).max() < DIFFERENT * rounding(case):
        return None
    ends, seconds = case.once(budget)
    end = min(ends, time.monotonic() + seconds)
    for n in range(1, prompts.shape[1]):
        if time.monotonic() > end:
            break
        if all(
            (below(case, prompts[rows, -n:], drawn[rows]) <= rounding(case)).all()
            for rows in (slice(4), slice(4, None))
        ):
            return n
    return None


def telling_prompts(case: Case, length: int, among: int) -> np.ndarray:
    """Return those of some prompts, random and of the user's text, of which the last tokens alone predict another id.

    Then those after which two ids are almost equally probable.
    """
    prompts = np.concatenate([case.ids(among // 2, length), own_text_or_random(case, among - among // 2, length)])
    logits = logits_after(case, prompts)
    best, second = np.sort(logits, axis=1)[:, :-3:-1].T
    others = np.zeros(among)
    for n in sorted({max(1, length // part) for part in (2, 4, 8, 16)}):
        ids = logits_after(case, prompts[:, -n:]).argmax(axis=1)
        others += best - logits[np.arange(among), ids] > DIFFERENT * rounding(case)
    return prompts[np.lexsort((best - second, -others))[:PROMPTS]]


def greedy(case: Case, prompts: np.ndarray) -> np.ndarray | None:
    """Return the greedy id after each prompt, (N,); None where ``sample`` has no setting for it."""
    for name, value in (("temperature", 0.0), ("top_k", 1)):
        if name not in accepted(case):
            continue
        settings = settings_off(case, **{name: value})
        try:
            drawn = [inside(case, new_ids(case, prompt, 1, **settings)) for prompt in prompts.tolist()]
        except CallFailed:  # refuses 0
            continue
        return np.concatenate(drawn).astype(int) if all(drawn) else None
    return None
