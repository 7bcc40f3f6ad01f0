"""The key-value cache: a prompt read at once and then token by token has the logits of the whole text."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.probes import EQUAL, between, first_call, largest, probe_length, steady_noise

LIMIT = 5e-4  # of the logits' standard deviation; healthy float32: below 2e-6; lost keys in an untrained model: 1e-3
HALF = 0.1  # the limit where other shapes change the logits without a cache too: bfloat16, below 0.05


def cached_logits(case: Case, ids: np.ndarray, n_prompt: int) -> np.ndarray:
    """Return the logits (T, V) that the cache gives for a text."""
    logits = case.call_function("cached", lambda: as_numpy(case.given["cached"](ids.tolist(), n_prompt)))
    if logits.ndim == 3 and len(logits) == 1:
        (logits,) = logits
    if logits.shape != (len(ids), case.vocab_size):
        expected = (len(ids), case.vocab_size)
        raise CallFailed("cached", "wrong-shape", f"cached returned shape {logits.shape}; expected {expected}")
    return logits.astype(np.float32)


def cached_difference(case: Case, n_prompt: int) -> np.ndarray:
    """Return the difference of cached logits and forward's for a random text, relative to their scale: (T,)."""
    ids = case.ids(1, probe_length(case))
    difference = np.abs(between(case.logits(ids)[0], cached_logits(case, ids[0], n_prompt))).max(axis=-1)
    return np.nan_to_num(difference, nan=np.inf) / case.once(steady_noise).scale


def shape_difference(case: Case) -> float:
    """Return how far the logits of prefixes alone are from those in a longer text: rounding, in a sound model."""
    ids = case.ids(1, probe_length(case))
    whole = case.logits(ids)[0]
    differences = [np.abs(between(whole[: t + 1], case.logits(ids[:, : t + 1])[0])).max() for t in range(ids.shape[1])]
    return float(np.nan_to_num(max(differences), nan=np.inf)) / case.once(steady_noise).scale


@check("cache-mismatch", "forward", "cached", explained_by=("state", "causality", "inputs"))
def cache_mismatch(case: Case) -> dict[str, Any] | None:
    """Text goes wrong when it is generated with the key-value cache: its logits differ from those of the whole text.

    Compared at prompts of 1 and 2 tokens, half of the text, all but one token and all tokens. Threshold: 5e-4 of the
    logits' standard deviation, or ten times what other shapes change without a cache, at most 0.1. Where forward itself
    is faulty, the cache has a fault of its own if its logits depend on the length of the prompt, though those in the
    prompt do not depend on later tokens.
    """
    case.once(first_call)
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    differences = {n_prompt: cached_difference(case, n_prompt) for n_prompt in sorted({1, 2, T // 2, T - 1, T} - {0})}
    if max(map(largest, differences.values())) <= LIMIT:
        return None
    limit = float(np.clip(10 * case.once(shape_difference), LIMIT, HALF))
    sizes = {n: (int((moved > limit).argmax()), largest(moved)) for n, moved in differences.items()}
    wrong = {n: place for n, place in sizes.items() if place[1] > limit}
    if not wrong:
        return None
    separate = bool(case.found) and disagrees_with_itself(case)
    if changed := random_by(case):
        return random_cache(changed) | {"separate": separate}
    n_prompt, (position, size) = min(wrong.items(), key=lambda item: (item[1][0], item[0]))
    where = "in the prompt" if position < n_prompt else f"{position - n_prompt + 1} tokens after it"
    return {
        "separate": separate,
        "measured": size,
        "expected": f"below {limit:.2g}",
        "why": f"with a prompt of {n_prompt} tokens the cached logits are first wrong at position {position}, {where}, "
        f"by up to {size:.2g} of their standard deviation",
        "remedy": "offset positions and the causal mask by the length of the cache, append keys and values on the time "
        "axis, and empty the cache before each text",
        "evidence": {
            "position": position,
            "n_prompt": n_prompt,
            "first_wrong_position": {str(n): first for n, (first, _) in wrong.items()},
            "right_at": [n for n in differences if n not in wrong],
        },
    }


def random_by(case: Case) -> float:
    """Return by how much cached logits differ in a second call, relative, where those of forward do not; else 0."""
    if case.once(steady_noise).relative > EQUAL:
        return 0.0
    T = probe_length(case)
    (ids,) = case.ids(1, T)
    first, second = (cached_logits(case, ids, T // 2) for _ in range(2))
    size = largest(between(first, second)) / case.once(steady_noise).scale
    return size if size > LIMIT else 0.0


def random_cache(size: float) -> dict[str, Any]:
    return {
        "measured": size,
        "expected": 0,
        "why": f"cached returns other logits at each call, by up to {size:.2g} of their standard deviation, as with "
        "dropout left on or a cache that is never emptied; those of forward stay the same",
        "remedy": "generate in evaluation mode, model.eval(), and begin each text with an empty cache",
        "evidence": {},
        "explains": ("sampler-not-the-model", "beyond-context"),
    }


def disagrees_with_itself(case: Case) -> bool:
    """Return True if cached logits differ in a second call, or, for causal ones, with a shorter prompt.

    A shorter prompt does not count if forward gives the same logits for each prefix, or depends on the length itself.
    """
    T, scale = probe_length(case), case.once(steady_noise).scale
    ids = case.ids(1, T)[0]
    changed = np.concatenate([ids[: T // 2], case.ids(1, T - T // 2)[0]])
    whole, again = cached_logits(case, ids, T), cached_logits(case, ids, T)
    if largest(between(whole, again)) > LIMIT * scale:
        return not {"depends-on-earlier-calls", "not-deterministic"} & case.found.keys()
    causal = largest(between(whole, cached_logits(case, changed, T))[: T // 2]) <= EQUAL * scale
    if not causal or ("length-dependent" in case.found and "future-leak" not in case.found):
        return False
    runs = {n: cached_logits(case, ids, n) for n in (1, 2, T // 2)}
    prefixes = np.stack([case.logits(ids[None, : t + 1])[0, -1] for t in range(T)])
    as_forward = all(largest(between(run[n:], prefixes[n:])) <= LIMIT * scale for n, run in runs.items())
    return not as_forward and any(largest(between(whole, run)) > LIMIT * scale for run in runs.values())
