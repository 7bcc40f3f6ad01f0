"""State: a forward pass returns the same logits at each call with the same text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.probes import (
    EQUAL,
    STEADY,
    between,
    equal_within,
    first_call,
    largest,
    noise,
    probe_length,
    repeats_with_seed,
    steady_noise,
)

MOST_CALLS = 128
OF_OTHER_CALLS = (  # what functions show that call the model themselves, in whatever state it is
    "loss-not-cross-entropy",
    "loss-not-the-mean",
    "accumulation-differs",
    "sampler-not-the-model",
    "draws-correlated",
)


@check("not-deterministic", "forward", explains=("cache-mismatch",))
def not_deterministic(case: Case) -> Found:
    """Two calls with the same text in evaluation mode return different logits, as with dropout left on.

    Threshold: 1e-6 of the logits' standard deviation; healthy models repeat bit for bit (float32, bfloat16, quantized).
    """
    calls = case.once(noise)
    if calls.relative <= equal_within(case) or not np.isfinite(calls.relative):
        return None
    return {
        "measured": calls.relative,
        "expected": 0,
        "why": f"two calls with the same ids differ by {calls.relative:.2g} of the logits' standard deviation",
        "remedy": "switch to evaluation mode before generating and evaluating: model.eval() turns dropout off",
        "evidence": {"difference": calls.difference, "scale": calls.scale},
    }


@check(
    "depends-on-earlier-calls",
    "forward",
    explains=(
        "not-deterministic",
        "row-alone-differs",
        "batch-leak",
        "future-leak",
        "future-leak-in-training",
        "length-dependent",
        "cache-mismatch",
        *OF_OTHER_CALLS,
    ),
)
def depends_on_earlier_calls(case: Case) -> Found:
    """The logits of a text depend on the calls made before, as with a cache that is never emptied.

    Two texts are read in the order A B B A, several times. With state, the logits of A after A and of A after B differ,
    and those at the same place of two rounds differ less. Measured is the second difference over the first: random
    noise has 0.97 to 1.03, state that fades below 0.1, state that grows below 0.9. Threshold 0.8. Also a fault if
    identical calls return to earlier logits within 128 calls, as where positions are counted on from call to call. A
    pass that repeats with the same seed is random and has no state.

    All further checks read one fixed text before each call. If identical calls then agree, the state explains no
    findings but those of losses, steps and samplers, before which no text is read.
    """
    case.once(first_call)
    T = probe_length(case)
    name = "forward_without_dropout" if case.has("forward_without_dropout") else "forward"
    texts = {"A": case.ids(1, T), "B": case.ids(1, T)}
    rounds = [[case.logits(texts[text], name) for text in "ABBA"] for _ in range(6)][2:]
    after_a, after_b = [logits[0] for logits in rounds], [logits[3] for logits in rounds]  # the logits of A
    scale = case.once(steady_noise).scale
    if case.once(noise).relative > EQUAL and case.once(repeats_with_seed):
        return None  # random, without state
    across = mean_square(zip(after_a, after_b, strict=True)) / scale**2
    along = mean_square([*pairwise(after_a), *pairwise(after_b)]) / scale**2
    if across <= EQUAL**2 or (along > 0.8 * across and not recurs(case, texts["A"], name, EQUAL * scale)):
        return None
    size = float(np.sqrt(across))
    case.prime(np.zeros((1, 2), np.int32))
    steady = {"explains": OF_OTHER_CALLS} if case.once(steady_noise).relative <= STEADY else {}
    if not steady:
        case.prime(None)
    return {
        **steady,
        "measured": size,
        "expected": 0,
        "why": f"the logits of a text differ by {size:.2g} of their standard deviation with the text read before",
        "remedy": "start each call without what earlier ones left: empty the cache, reset buffers and counters",
        "evidence": {"after_another_text": size, "after_the_same": float(np.sqrt(along))},
    }


def recurs(case: Case, ids: np.ndarray, name: str, tolerance: float) -> bool:
    """Return True if identical calls return to earlier logits, as with a counter that wraps; noise does not."""
    first = case.logits(ids, name)
    later = (largest(between(case.logits(ids, name), first)) for _ in range(min(case.n_positions, MOST_CALLS)))
    return any(difference <= tolerance for difference in later)


def mean_square(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([np.square(between(first, second)).mean() for first, second in pairs]))
