"""The doctor's check of the cache names each planted fault with its place, and passes sound caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import random_model
from helpers.plain_sampler import Forward, small_forward

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import run_checks
from mlx_gpt.check.doctor.forward import cache  # noqa: F401  (registers its check)
from mlx_gpt.check.doctor.report import Report

V, P = 31, 24


def examined(forward: Any, cached: Any, V: int = V, P: int = P) -> Report:
    given = {"forward": forward, "cached": cached}
    return run_checks(Case(given, V, P, minutes=1.0), [one for one in CHECKS if one.code == "cache-mismatch"])


def sound(forward: Forward) -> Callable[[list[int], int], np.ndarray]:
    """Return logits as a cache gives them: of the prompt at once, then of each longer text its last."""

    def cached(ids: list[int], n_prompt: int) -> np.ndarray:
        later = [forward(np.array([ids[: t + 1]]))[0, -1] for t in range(n_prompt, len(ids))]
        return np.concatenate([forward(np.array([ids[:n_prompt]]))[0], *[row[None] for row in later]])

    return cached


def test_a_sound_cache_has_no_finding() -> None:
    forward = small_forward(V, P)
    assert examined(forward, sound(forward)).findings == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_cache_of_this_package_has_no_finding(dtype: mx.Dtype) -> None:
    model = random_model()
    model.set_dtype(dtype)

    def cached(ids: list[int], n_prompt: int) -> mx.array:
        caches = model.make_cache()
        logits = [model(mx.array([ids[:n_prompt]]), caches)]
        logits += [model(mx.array([[i]]), caches) for i in ids[n_prompt:]]
        return mx.concatenate(logits, axis=1)[0]

    assert examined(lambda ids: model(mx.array(ids)), cached, V=37).findings == []


def late(forward: Forward, ids: list[int], n_prompt: int) -> np.ndarray:
    """Positions start again after the prompt."""
    later = [forward(np.array([ids[n_prompt : t + 1]]))[0, -1][None] for t in range(n_prompt, len(ids))]
    return np.concatenate([forward(np.array([ids[:n_prompt]]))[0], *later])


def second_lost(forward: Forward, ids: list[int], n_prompt: int) -> np.ndarray:
    """The second generated token is not appended to the cache."""
    right = sound(forward)(ids, n_prompt)
    for t in range(n_prompt + 2, len(ids)):
        right[t] = forward(np.array([[*ids[: n_prompt + 1], *ids[n_prompt + 2 : t + 1]]]))[0, -1]
    return right


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("fault", "position"), [(late, 1), (second_lost, 3)])
def test_a_wrong_cache_is_named_with_its_first_position(fault: Any, position: int, seed: int) -> None:
    forward = small_forward(V, P, seed=seed)
    (finding,) = examined(forward, lambda ids, n_prompt: fault(forward, ids, n_prompt)).findings
    assert finding.code == "cache-mismatch"
    assert (finding.evidence["position"], finding.evidence["n_prompt"]) == (position, 1)


def test_a_cache_that_is_never_emptied_is_named() -> None:
    forward, kept = small_forward(V, 4 * P), []

    def cached(ids: list[int], n_prompt: int) -> np.ndarray:
        start = len(kept)
        kept.extend(ids)
        return forward(np.array([kept[-3 * P :]]))[0, -len(ids) :] if start else sound(forward)(ids, n_prompt)

    (finding,) = examined(forward, cached).findings
    assert finding.code == "cache-mismatch"


def test_a_cache_that_returns_another_shape_is_named() -> None:
    assert [one.code for one in examined(small_forward(V, P), lambda ids, n: [1.0]).findings] == ["wrong-shape"]
