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
    always = all(np.array_equal(one.new, found[0].new) for _, found in draws for one in found)
    for temperature, found in draws:
        read = read_by_argmax(case, found)
        if read != TEXT and all(len({*one.new.tolist()}) == 1 for one in found):
            read = None  # an id that one noise repeats may be the argmax after itself
        alike = same_text(found, temperature) if always else 0.0  # one noise for all ids hides flat predictions
        codes = []
        if read is not None:
            seen = found if read == TEXT else read_otherwise(case, found, windows(case)[read])
            codes += [read[0]] if read[0] and of_chance(found, temperature) < -SURE else []
            codes += ["sampler-too-narrow"] if of_chance(seen, temperature) < -SURE else []
        elif alike < -SURE:
            codes = ["prompt-ignored"]
        if codes:
            nats = of_chance(found, temperature) if read is not None else alike
            what = (
                f"equal after each of {len(found)} prompts"
                if read is None
                else f"the argmax after {read[1] or 'the text'}"
            )
            return {code: drawing_fault(code, f"{count(found)} draws are {what}", nats, found) for code in codes}
    return {}


def read_by_argmax(case: Case, found: list[Draws]) -> Named | None:
    """Return the text after which every draw is the most probable id, within rounding; None if there is none."""
    reads = {TEXT: None, **windows(case)}
    for name, window in reads.items():
        seen = found if window is None else read_otherwise(case, found, window)
        if all((chosen(one.logits, one.new) >= one.logits.max(axis=1) - rounding(case)).all() for one in seen):
            return name
    return None


def of_chance(found: list[Draws], temperature: float) -> float:
    """Return a bound on the log-probability of all draws: the sum over steps of the least probable draw."""
    return by_step([chosen(log_softmax(one.logits / temperature), one.new) for one in found])


def by_step(values: list[np.ndarray]) -> float:
    """Return the sum over steps of the least value of a step."""
    steps = range(max(map(len, values)))
    return float(sum(min(one[t] for one in values if len(one) > t) for t in steps))


def same_text(found: list[Draws], temperature: float) -> float:
    """Return a bound on the log-probability that all prompts are followed by the same text; 0 if they are not.

    For each step, the probability that the predictions after all prompts have in common. If the text repeats one id,
    also the least probable draw of each step, times the number of ids.
    """
    first = found[0].new
    if len(found) < 2 or any(not np.array_equal(one.new, first) for one in found):
        return 0.0
    common = np.min([log_softmax(one.logits / temperature) for one in found], axis=0)
    nats = float(np.log(np.maximum(np.exp(common).sum(axis=1), 1e-30)).sum())
    one_id = len(set(first.tolist())) == 1
    return min(nats, of_chance(found, temperature) + log(common.shape[1])) if one_id else nats
