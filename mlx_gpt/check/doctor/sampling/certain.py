"""Samplers that give the same text at each call: always the argmax, or the same text after every prompt.

The random numbers of a step may be the same in all calls, so the draws of a step after all prompts count once: the
probability of an event after every prompt is at most the least of its probabilities. Steps are independent: the
probability for all steps is at most the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.sampling.contexts import TEXT, Named, read_otherwise, windows
from mlx_gpt.check.doctor.sampling.draws import Draws, chosen, count, log_softmax
from mlx_gpt.check.doctor.sampling.findings import drawing_fault
from mlx_gpt.check.doctor.sampling.fit import SURE
from mlx_gpt.check.doctor.sampling.texts import rounding


def certain(case: Case, draws: Sequence[tuple[float, list[Draws]]]) -> dict[str, dict[str, Any]]:
    """Return the findings for draws, by temperature, that are always the argmax or the same after every prompt."""
    always = all(np.array_equal(call.new, calls[0].new) for _, calls in draws for call in calls)
    for temperature, calls in draws:
        read = read_by_argmax(case, calls)
        if read != TEXT and all(len({*call.new.tolist()}) == 1 for call in calls):
            read = None  # an id that one noise repeats may be the argmax after itself
        alike = same_text(calls, temperature) if always else 0.0  # one noise for all ids hides flat predictions
        codes = []
        if read is not None:
            seen = calls if read == TEXT else read_otherwise(case, calls, windows(case)[read])
            codes += [read[0]] if read[0] and of_chance(calls, temperature) < -SURE else []
            codes += ["sampler-too-narrow"] if of_chance(seen, temperature) < -SURE else []
        elif alike < -SURE:
            codes = ["prompt-ignored"]
        if codes:
            nats = of_chance(calls, temperature) if read is not None else alike
            what = (
                f"equal after each of {len(calls)} prompts"
                if read is None
                else f"the argmax after {read[1] or 'the text'}"
            )
            return {code: drawing_fault(code, f"{count(calls)} draws are {what}", nats, calls) for code in codes}
    return {}


def read_by_argmax(case: Case, calls: list[Draws]) -> Named | None:
    """Return the text after which every draw is the most probable id, within rounding; None if there is none."""
    reads = {TEXT: None, **windows(case)}
    for name, window in reads.items():
        seen = calls if window is None else read_otherwise(case, calls, window)
        if all((chosen(call.logits, call.new) >= call.logits.max(axis=1) - rounding(case)).all() for call in seen):
            return name
    return None


def of_chance(calls: list[Draws], temperature: float) -> float:
    """Return a bound on the log-probability of all draws: the sum over steps of the least probable draw."""
    return by_step([chosen(log_softmax(call.logits / temperature), call.new) for call in calls])


def by_step(values: list[np.ndarray]) -> float:
    """Return the sum over steps of the least value of a step."""
    steps = range(max(map(len, values)))
    return float(sum(min(row[t] for row in values if len(row) > t) for t in steps))


def same_text(calls: list[Draws], temperature: float) -> float:
    """Return a bound on the log-probability that all prompts are followed by the same text; 0 if they are not.

    For each step, the probability that the predictions after all prompts have in common. If the text repeats one id,
    also the least probable draw of each step, times the number of ids.
    """
    first = calls[0].new
    if len(calls) < 2 or any(not np.array_equal(call.new, first) for call in calls):
        return 0.0
    common = np.min([log_softmax(call.logits / temperature) for call in calls], axis=0)
    nats = float(np.log(np.maximum(np.exp(common).sum(axis=1), 1e-30)).sum())
    one_id = len(set(first.tolist())) == 1
    return min(nats, of_chance(calls, temperature) + log(common.shape[1])) if one_id else nats
