"""Findings about what is drawn from, and about settings: their fields and remedies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_gpt.check.doctor.sampling.draws import Draws, count

REMEDIES = {
    "setting-ignored": "pass {} on to where the next id is drawn, and use the changed logits there",
    "setting-inverted": "check the direction of {}: divide by the temperature, keep the most probable ids",
    "setting-wrong": "check what {} does: temperature divides the logits; top-k keeps k ids, top-p the fewest most "
    "probable ones whose sum reaches p, and both set the other logits to −inf, no others; temperature 1, "
    "top_k 0 and top_p 1 are off",
}
OF_DRAWS = {
    "probabilities-as-logits": "give the drawing function, such as mx.random.categorical, the logits or "
    "log-probabilities",
    "sampler-too-narrow": "draw from the softmax of the logits instead of taking their argmax",
    "draws-correlated": "draw new random numbers for every token: split the key, and seed once, not at every step",
}
FEED = (
    "feed the prompt and all ids drawn so far, or their cache, with dropout off, and draw an index of the last logits"
)


def setting_fault(code: str, setting: str, value: float, why: str, draws: int) -> dict[str, Any]:
    return {
        "measured": why,
        "expected": f"the draws of {setting} = {value:g}",
        "why": why,
        "remedy": REMEDIES[code].format(setting),
        "evidence": {"setting": setting, "value": value, "draws": draws},
    }


def drawing_fault(
    code: str, why: str, measured: float, calls: Sequence[Draws], expected: Any = "above -20 nats", **evidence: Any
) -> dict[str, Any]:
    """Return the fields of a fault in the distribution that is drawn from.

    ``measured`` and ``expected`` are by default log-probabilities, of chance, in nats.
    """
    return {
        "measured": measured,
        "expected": expected,
        "why": why,
        "remedy": OF_DRAWS.get(code, FEED),
        "evidence": {"draws": count(calls), **evidence},
    }
