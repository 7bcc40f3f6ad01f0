"""The doctor's checks of sampling name each planted fault, and pass healthy samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.plain_sampler import SETTINGS, Forward, PlainSampler, small_forward

from mlx_gpt.check.doctor import examine  # noqa: F401  (registers their checks)
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.codes import group_of
from mlx_gpt.check.doctor.examine import run_checks
from mlx_gpt.check.doctor.report import Report
from mlx_gpt.check.doctor.sampling.texts import shapes

V, P = 31, 24
FAULTS = {
    "sampler-too-narrow": "sampler-too-narrow",
    "probabilities-as-logits": "probabilities-as-logits",
    "previous position": "sampler-not-the-model",
    "last 8 tokens": "sampler-not-the-model",
    "a fifth uniform": "sampler-not-the-model",
    "next id": "sampler-not-the-model",
    "prompt-ignored": "prompt-ignored",
    "last token only": "prompt-ignored",
    "same noise": "draws-correlated",
    "same random number": "draws-correlated",
    "ids plus one": "id-outside-vocabulary",
    "returns another prompt": "prompt-changed",
    "appends to the prompt": "prompt-changed",
    "temperature ignored": "setting-ignored",
    "top_k ignored": "setting-ignored",
    "top_p ignored": "setting-ignored",
    "penalty ignored": "setting-ignored",
    "temperature inverted": "setting-inverted",
    "top_k inverted": "setting-inverted",
    "top_p inverted": "setting-inverted",
    "top_k one more": "setting-wrong",
    "top_k one less": "setting-wrong",
    "top_k 0 keeps one": "setting-wrong",
    "top_p 1 is 0.7": "setting-wrong",
    "top_k zeroes": "setting-wrong",
    "top_k uniform": "setting-wrong",
    "top_p zeroes": "setting-wrong",
    "top_p one more": "setting-wrong",
    "top_p one less": "setting-wrong",
    "penalty-rewards-repetition": "penalty-rewards-repetition",
    "penalty-compounds": "penalty-compounds",
    "beyond-context": "beyond-context",
    "returns the last of its text": "beyond-context",
    "positions stay": "beyond-context",
}
KINDS = [(kind, 31, 1) for kind in ("", "returns the prompt", "returns an array", "seeded")]
SIZES = [pytest.param("", V, scale, marks=pytest.mark.slow) for V, scale in ((2, 1), (31, 8), (300, 0.05))]


def examined(forward: Forward, sample: Any, V: int = V, P: int = P, **given: Any) -> Report:
    """Return the report of the checks of sampling."""
    given = {"forward": forward, "sample": sample, "sample_settings": set(SETTINGS), **given}
    checks = [one for one in CHECKS if group_of(one.code) == "sampling"]
    return run_checks(Case(given, V, P, minutes=10.0), checks)


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def one_of_each(faults: dict[str, str]) -> list[Any]:
    """Mark as slow all faults but the first of each code."""
    first = {code: fault for fault, code in reversed(faults.items())}
    return [pytest.param(*one, marks=[] if first[one[1]] == one[0] else pytest.mark.slow) for one in faults.items()]


@pytest.mark.parametrize(("fault", "code"), one_of_each(FAULTS))
def test_a_planted_fault_is_named(fault: str, code: str) -> None:
    forward = small_forward(V, P, 2.0, 0)
    report = examined(forward, PlainSampler(forward, V, P, fault, 0))
    assert codes(report) == [code], str(report)


CERTAIN = {  # of samplers without settings and without chance
    "sampler-too-narrow": ["sampler-too-narrow"],
    "sampler-too-narrow + prompt-ignored": ["sampler-too-narrow", "prompt-ignored"],
    "sampler-too-narrow + last token only": ["sampler-too-narrow", "prompt-ignored"],
    "seeded": [],
}


@pytest.mark.parametrize(("fault", "named"), CERTAIN.items())
def test_a_greedy_sampler_without_settings_is_told_from_a_seeded_one(fault: str, named: list[str]) -> None:
    forward = small_forward(V, P, 2.0, 0)
    sampler = PlainSampler(forward, V, P, fault)
    assert codes(examined(forward, lambda ids, n: sampler(ids, n), sample_settings=None)) == named


@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_a_sampler_that_repeats_one_id_ignores_the_prompt(settings: Any) -> None:
    report = examined(small_forward(V, P, 2.0), lambda ids, n, **chosen: [7] * n, sample_settings=settings)
    assert codes(report) == ["prompt-ignored"]


def test_one_noise_in_all_calls_is_no_ignored_prompt_where_predictions_are_flat() -> None:
    forward = small_forward(V, P, 0.1, 0)
    assert codes(examined(forward, PlainSampler(forward, V, P, "seeded + same noise"))) == ["draws-correlated"]


@pytest.mark.parametrize(("settings", "V"), [(None, 5), (SETTINGS, 31)])
def test_a_sampler_that_draws_from_all_ids_alike_is_not_the_model(settings: Any, V: int) -> None:
    rng = np.random.default_rng(0)
    sample = lambda ids, n, **chosen: rng.integers(0, V, n).tolist()  # noqa: E731
    report = examined(small_forward(V, P, 2.0), sample, V, sample_settings=settings)
    assert codes(report) == ["sampler-not-the-model"]


def test_two_softmaxes_of_many_ids_are_named_though_their_draws_are_almost_uniform() -> None:
    forward = small_forward(1000, P, 2.0, 0)
    rng = np.random.default_rng(0)
    twice = PlainSampler(forward, 1000, P, "softmax twice", 0)
    uniform = lambda ids, n, **chosen: rng.integers(0, 1000, n).tolist()  # noqa: E731
    for sample in (twice, uniform):  # which a few thousand draws do not tell apart
        report = examined(forward, sample, 1000, sample_settings={"temperature"})
        assert codes(report) == ["probabilities-as-logits"]
        assert "or are uniform" in report.findings[0].why


def test_a_top_p_that_does_not_sort_is_described() -> None:
    forward = small_forward(V, P, 2.0, 0)
    (finding,) = examined(forward, PlainSampler(forward, V, P, "top_p unsorted")).findings
    assert (finding.code, "by number, not by probability" in finding.why) == ("setting-wrong", True)


def test_a_small_leak_is_rounding_only_until_it_is_found() -> None:
    sound = small_forward(V, P)

    def leaks(ids: np.ndarray) -> np.ndarray:
        return sound(ids) + 0.01 * np.sin(ids[:, -1:, None] * np.arange(1, V + 1)).astype(np.float32)

    case = Case({"forward": leaks}, V, P, minutes=1.0)
    assert shapes(case).prefixes
    assert shapes(case).rounding > 0.01
    case.found["future-leak"] = {}
    assert not shapes(case).prefixes
    assert shapes(case).rounding < 1e-4


@pytest.mark.parametrize(("kind", "V", "scale"), [*KINDS, *SIZES])
def test_a_healthy_sampler_has_no_fault(kind: str, V: int, scale: float) -> None:
    forward = small_forward(V, P, scale, 0)
    report = examined(forward, PlainSampler(forward, V, P, kind, 0), V)
    assert codes(report) == [], str(report)


@pytest.mark.parametrize("P", [3, 5, pytest.param(64, marks=pytest.mark.slow)])
def test_a_sampler_without_settings_has_no_fault(P: int) -> None:
    forward = small_forward(V, P)
    sampler = PlainSampler(forward, V, P)
    assert codes(examined(forward, lambda ids, n: sampler(ids, n), P=P, sample_settings=None)) == []


@pytest.mark.parametrize(("fault", "named"), {"": [], "top_k inverted": ["setting-inverted"]}.items())
def test_a_sampler_that_raises_at_top_k_0_as_nanogpts_is_examined_without_it(fault: str, named: list[str]) -> None:
    forward = small_forward(V, P, 2.0)
    sampler = PlainSampler(forward, V, P, fault)

    def sample(ids: list[int], n: int, temperature: float = 1.0, top_k: int | None = None) -> list[int]:
        if top_k == 0:
            raise IndexError("index -1 is out of bounds for dimension 1 with size 0")
        return sampler(ids, n, temperature=temperature, top_k=top_k or 0)

    assert codes(examined(forward, sample, sample_settings={"temperature", "top_k"})) == named


def test_a_sampler_that_ends_at_an_end_token_has_no_fault() -> None:
    forward = small_forward(V, P)
    sampler = PlainSampler(forward, V, P)

    def sample(ids: list[int], n: int, **chosen: float) -> list[int]:
        new = sampler(ids, n, **chosen)  # type: ignore[arg-type]
        return new[: new.index(3)] if 3 in new else new

    assert codes(examined(forward, sample, end_of_text=3)) == []


def padded(forward: Forward, correctly: bool) -> Any:
    """Return a ``sample_many`` that chooses greedily, with its prompts padded by zeros on the left unless correct."""

    def sample_many(prompts: list[list[int]], n: int, **chosen: float) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = [[*([] if correctly else [0] * (longest - len(prompt))), *prompt] for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        for _ in range(n):
            for row, out in zip(rows, new, strict=True):
                out.append(int(forward(np.array([row]))[0, -1].argmax()))
                row.append(out[-1])
        return new

    return sample_many


@pytest.mark.parametrize("correctly", [True, False])
def test_padding_that_changes_a_text_is_named(correctly: bool) -> None:
    forward = small_forward(V, P)
    report = examined(forward, PlainSampler(forward, V, P), sample_many=padded(forward, correctly))
    assert codes(report) == ([] if correctly else ["padding-differs"])


def test_a_sampler_whose_texts_may_end_at_once_has_no_fault() -> None:
    forward = small_forward(V, P)
    sampler = PlainSampler(forward, V, P)

    def sample(ids: list[int], n: int, **chosen: float) -> list[int]:
        return [] if ids[-1] % 3 == 0 else sampler(ids, n, **chosen)  # type: ignore[arg-type]

    assert codes(examined(forward, sample)) == []
    assert codes(examined(forward, lambda ids, n, **chosen: [])) == []
