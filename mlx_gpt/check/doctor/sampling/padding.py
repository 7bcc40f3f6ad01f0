"""Prompts of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.sampling.draws import accepted, require_time, settings_off
from mlx_gpt.check.doctor.sampling.texts import below, logits_after, rounding
from mlx_gpt.check.doctor.sampling.verdict import understood

Rows = list[list[int]]
CALLS = 4


@check("padding-differs", "sample_many")
def padding_differs(case: Case) -> Found:
    """A prompt in a batch with longer ones gets another text than alone: padding is attended to or shifts positions.

    Exact, at temperature 0 or top-k 1: in a batch, as for a prompt alone, each new id must be the argmax of the model's
    logits after its own text, within rounding. Prompts are chosen after which two ids are almost equally probable.
    """
    if case.has("sample"):
        understood(case)
    settings, lengths = case.once(greedy_settings)
    for _ in range(CALLS):
        require_time(case)
        prompts = [prompt for length in lengths for prompt in close_prompts(case, length)]
        for prompt, new in zip(prompts, many(case, prompts, number(case), settings), strict=True):
            if most_below(case, prompt, new) <= rounding(case):
                continue
            (alone,) = many(case, [prompt], number(case), settings)
            if most_below(case, prompt, alone) > rounding(case):
                raise NotApplicable("a sample_many whose text of one prompt is the argmax at temperature 0")
            return {
                "measured": new,
                "expected": alone,
                "why": f"a prompt of {len(prompt)} ids beside one of {lengths[-1]} gets another greedy text",
                "remedy": "pad on the left, mask the padding, and count positions from each prompt's start",
                "evidence": {"prompt": prompt, "lengths": lengths},
            }
    if not would_show(case, prompts):
        raise NotApplicable("a model whose predictions differ more")
    return None


def would_show(case: Case, prompts: Rows) -> bool:
    """Return True if padding by id 0, on the left and on the right, changes the argmax after some of the prompts."""
    longest = max(map(len, prompts))
    pads = [[0] * (longest - len(prompt)) for prompt in prompts]
    left, right = ([*map(list.__add__, *sides)] for sides in ((pads, prompts), (prompts, pads)))
    own, *padded = (logits_after(case, texts).argmax(axis=1) for texts in (prompts, left, right))
    return all((own != other).any() for other in padded)


def number(case: Case) -> int:
    """Return the number of new ids for each prompt."""
    return max(1, min(6, case.n_positions // 2))


def greedy_settings(case: Case) -> tuple[dict[str, Any], list[int]]:
    """Return settings for greedy decoding, and lengths of prompts."""
    P = case.n_positions
    lengths = sorted({1, 2, max(1, min(8, P // 4)), max(1, min(16, P // 2))})
    for name, value in (("temperature", 0.0), ("top_k", 1)):
        if name not in accepted(case):
            continue
        settings, prompt = settings_off(case, **{name: value}), case.ids(1, lengths[-1])[0].tolist()
        try:
            (new,) = many(case, [prompt], max(1, min(4, P - len(prompt))), settings)
        except CallFailed:
            continue
        if most_below(case, prompt, new) <= rounding(case):
            return settings, lengths
    raise NotApplicable("sample_settings with temperature, at 0, or top_k, at 1, for greedy text")


def close_prompts(case: Case, length: int) -> Rows:
    """Return those two of some prompts after which the two most probable ids are nearest, but beyond rounding."""
    prompts = case.ids(int(np.clip(1_000_000 // (case.vocab_size * length), 4, 128)), length)
    logits = np.sort(logits_after(case, prompts), axis=1)
    if case.vocab_size < 2:
        return prompts[:2].tolist()
    gaps = logits[:, -1] - logits[:, -2]
    return prompts[np.argsort(np.where(gaps > 2 * rounding(case), gaps, np.inf))[:2]].tolist()


def many(case: Case, prompts: Rows, n: int, settings: dict[str, Any]) -> Rows:
    """Return the new ids that ``sample_many`` gives for each prompt."""
    call: Callable[[], Rows] = lambda: [  # noqa: E731
        [int(i) for i in row] for row in case.given["sample_many"]([[*prompt] for prompt in prompts], n, **settings)
    ]
    rows = case.call_function("sample_many", call)
    if len(rows) != len(prompts):
        raise CallFailed("sample_many", "wrong-shape", f"sample_many returned {len(rows)} rows for {len(prompts)}")
    with_prompt = any(len(row) > n for row in rows)
    return [row[len(prompt) :] if with_prompt else row for prompt, row in zip(prompts, rows, strict=True)]


def most_below(case: Case, prompt: Sequence[int], new: Sequence[int]) -> float:
    """Return how far a new id's logit is below the largest, the most over the new ids; infinity for unknown ids."""
    if not new or min(new) < 0 or max(new) >= case.vocab_size:
        return 0.0 if not new else np.inf
    return float(below(case, [[*prompt, *new[:t]] for t in range(len(new))], np.array(new)).max())
