"""Samplers that read fewer tokens than the context has, by greedy draws after long prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.sampling.draws import accepted, budget, inside, new_ids, settings_off
from mlx_gpt.check.doctor.sampling.texts import logits_after, rounding

LONGEST = 64  # ids of a prompt
PROMPTS, AMONG = 24, 96
NUMBERS = 2e6  # of logits of prompts among which to choose
DIFFERENT = 8  # times the rounding by which the logit of a draw must be below the largest


def tokens_read(case: Case) -> int | None:
    """Return how many of the last tokens of a prompt are read, where it is not all of them; None if that is unknown.

    Exact at temperature 0 or top-k 1: all draws are the argmax after that many, to rounding, and one is not after the
    prompt.
    """
    if case.vocab_size < 2:
        return None
    prompts = undecided_prompts(case)
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


def undecided_prompts(case: Case) -> np.ndarray:
    """Return long prompts, those of some after which the two most probable ids are nearest, but beyond rounding."""
    length = max(1, min(LONGEST, case.n_positions - 1))
    prompts = case.ids(int(np.clip(NUMBERS // (length * case.vocab_size), PROMPTS, AMONG)), length)
    second, first = np.sort(logits_after(case, prompts), axis=1)[:, -2:].T
    gaps = first - second
    return prompts[np.argsort(np.where(gaps > 2 * rounding(case), gaps, np.inf))[:PROMPTS]]


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


def below(case: Case, texts: Sequence[np.ndarray] | np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return how far the logit of an id after each text is below the largest, (N,)."""
    logits = logits_after(case, texts)
    return logits.max(axis=1) - logits[np.arange(len(ids)), ids]
