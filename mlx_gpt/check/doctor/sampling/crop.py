"""Samplers that read only the last tokens of a prompt, found by greedy draws after long prompts."""

from __future__ import annotations

import time

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.sampling.draws import accepted, budget, inside, new_ids, settings_off
from mlx_gpt.check.doctor.sampling.texts import below, rounding, undecided_prompts

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
    prompts = undecided_prompts(case, length, among, PROMPTS)
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
