"""Samplers that read only the last tokens of a prompt, found by greedy draws after long prompts."""

from __future__ import annotations

import time

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.probes import own_text_or_random
from mlx_gpt.check.doctor.sampling.draws import accepted, budget, inside, new_ids, settings_off
from mlx_gpt.check.doctor.sampling.texts import below, logits_after, rounding

LONGEST = 64  # ids of a prompt
PROMPTS, AMONG = 24, 96  # prompts, and how many they are chosen from at a time
BATCHES = 8  # the most that are looked through for prompts that tell
NUMBERS = 2e6  # logits of those, at most
DIFFERENT = 8  # times the rounding, by which a draw's logit must be below the largest to be another id


def tokens_read(case: Case) -> int | None:
    """Return how many of a prompt's last tokens are read, if not all of them; None if all are, or it is unknown.

    Exact, at temperature 0 or top-k 1: all draws are the argmax after that many tokens, within rounding, and at least
    one is not the argmax after the whole prompt. Where several numbers explain them, prompts that tell these apart
    decide.
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
    end, left = min(ends, time.monotonic() + seconds), list[int]()
    for n in range(1, prompts.shape[1]):
        if time.monotonic() > end:
            break
        if all(is_argmax_after(case, prompts[rows], drawn[rows], n) for rows in (slice(4), slice(4, None))):
            left.append(n)
    while len(left) > 1 and time.monotonic() < end:  # several explain the few ids
        prompts = differing_prompts(case, left, length, among)
        if not len(prompts) or (drawn := greedy(case, prompts)) is None:
            break
        left = [n for n in left if is_argmax_after(case, prompts, drawn, n)]
    return left[-1] if left else None


def is_argmax_after(case: Case, prompts: np.ndarray, drawn: np.ndarray, n: int) -> bool:
    """Return True if each drawn id is the argmax after the last n tokens of its prompt, within rounding."""
    return bool((below(case, prompts[:, -n:], drawn) <= rounding(case)).all())


def differing_prompts(case: Case, lengths: list[int], length: int, among: int) -> np.ndarray:
    """Return a few prompts after which the longest of some lengths predicts another id than a shorter one.

    Up to ``BATCHES`` times ``among`` prompts are tried; none is returned if no such prompt is among them.
    """
    for _ in range(BATCHES):
        prompts = mixed_prompts(case, length, among)
        logits = [logits_after(case, prompts[:, -n:]) for n in lengths]
        ids, lost = logits[-1].argmax(axis=1), np.zeros(among)
        for shorter in logits[:-1]:
            lost = np.maximum(lost, shorter.max(axis=1) - shorter[np.arange(among), ids])
        order = np.argsort(-lost)[: PROMPTS // 3]
        order = order[lost[order] > DIFFERENT * rounding(case)]
        if len(order):
            break
    return prompts[order]


def mixed_prompts(case: Case, length: int, n: int) -> np.ndarray:
    """Return n prompts, half of them random ids and half of the user's text where there is one."""
    return np.concatenate([case.ids(n // 2, length), own_text_or_random(case, n - n // 2, length)])


def telling_prompts(case: Case, length: int, among: int) -> np.ndarray:
    """Return those of some prompts, random and of the user's text, of which the last tokens alone predict another id.

    Four numbers of last tokens are tried, on up to ``BATCHES`` times ``among`` prompts as long as one has too few. The
    others are those after which two ids are almost equally probable.
    """
    lengths = sorted({max(1, length // part) for part in (2, 4, 8, 16)})
    each = PROMPTS // len(lengths)
    end, batches = time.monotonic() + case.once(budget)[1], list[np.ndarray]()
    lost, near = np.zeros((len(lengths), 0)), np.zeros(0)
    while not batches or (len(batches) < BATCHES and time.monotonic() < end):
        batch = mixed_prompts(case, length, among)
        batches.append(batch)
        logits = logits_after(case, batch)
        best, second = np.sort(logits, axis=1)[:, :-3:-1].T
        others = [logits_after(case, batch[:, -n:]).argmax(axis=1) for n in lengths]
        lost = np.hstack([lost, [best - logits[np.arange(among), ids] for ids in others]])
        near = np.concatenate([near, best - second])
        if ((lost > DIFFERENT * rounding(case)).sum(axis=1) >= each).all():
            break
    most = np.argsort(-lost, axis=1)[:, :each].T.ravel()
    return np.concatenate(batches)[[*dict.fromkeys([*most.tolist(), *np.argsort(near).tolist()])][:PROMPTS]]


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
