"""The page's sampling rules give the probabilities of Python's sampler."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.generate.history import History
from mlx_gpt.generate.sampler import Sampler, Vocabulary
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser
V = 300  # with 43 ids that no token has
UNKNOWN = [*range(257, V)]
RNG = np.random.default_rng(0)
LOGITS = {
    "normal": RNG.normal(0, 3, V),
    "ties": RNG.integers(-2, 3, V),
    "all equal": np.zeros(V),
    "one certain": np.where(np.arange(V) == 7, 80, 0),
    "powers of two": -np.log(2) * np.minimum(np.arange(V), 20),
}
SETTINGS = [
    {"temperature": temperature, "top_k": k, "top_p": p}
    for temperature, k, p in product([1, 0.7, 3, 1e-6], [0, 1, 5, V, 10 * V], [1, 0.9, 0.3, 1e-6])
]


def python_probabilities(logits: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    sampler = Sampler([GenerationSettings(**settings)], Vocabulary(Tokenizer.bytes(), V), mx.zeros((1, 2), mx.uint32))
    rules = sampler.apply_rules(mx.array(logits[None]), sampler.inputs(History(mx.array([[0]]), [1])))
    return np.array(mx.softmax(rules, axis=-1, precise=True))[0]


@pytest.mark.parametrize("name", LOGITS)
def test_probabilities_are_those_of_pythons_sampler(modules: Any, name: str) -> None:
    logits = LOGITS[name].astype(np.float32)
    names = {"temperature": "temperature", "top_k": "topK", "top_p": "topP"}
    page = [{names[name]: value for name, value in settings.items()} | {"forbidden": UNKNOWN} for settings in SETTINGS]
    for found, settings in zip(modules("probabilities", logits.tolist(), page), SETTINGS, strict=True):
        expected = python_probabilities(logits, settings)
        assert ((np.array(found) > 0) == (expected > 0)).all(), settings
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9, err_msg=str(settings))


def test_temperature_0_is_the_first_of_the_most_probable(modules: Any) -> None:
    logits = [0.0, 2.0, 5.0, 5.0, -1.0]
    assert modules("probabilities", logits, [{"temperature": 0, "topP": 0.5}]) == [[0, 0, 1, 0, 0]]
    assert mx.argmax(mx.array(logits)).item() == 2


def test_ids_are_drawn_as_often_as_they_are_probable_and_a_seed_repeats_them(modules: Any) -> None:
    probabilities = [0.0, 0.5, 0.3, 0.0, 0.2, 0.0]
    (drawn,) = modules("draw", probabilities, [5], 20_000)
    shares = np.bincount(drawn, minlength=6) / len(drawn)
    np.testing.assert_allclose(shares, probabilities, atol=0.015)
    assert shares[[0, 3, 5]].sum() == 0
    again, other = modules("draw", probabilities, [5, 6], 50)
    assert again == drawn[:50] != other


def test_the_first_draws_of_neighboring_seeds_are_unrelated(modules: Any) -> None:
    first = [ids[0] for ids in modules("draw", [0.25] * 4, [*range(400)], 1)]
    assert (np.abs(np.bincount(first, minlength=4) - 100) < 40).all()
    repeats = sum(a == b for a, b in pairwise(first))
    assert 60 < repeats < 140
