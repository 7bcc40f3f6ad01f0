"""The doctor places loss and text on the ladder of n-gram models, and names what is reported or heard wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import planted_data, planted_optimisation
from helpers.planted import Base
from helpers.planted_level import FAULTS

from mlx_gpt.check.doctor import examine  # noqa: F401  (registers the checks)
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.codes import group_of
from mlx_gpt.check.doctor.examine import Examination, run_checks
from mlx_gpt.check.doctor.level import samples
from mlx_gpt.check.doctor.level.loss import ladder, validation_loss
from mlx_gpt.check.doctor.level.metrics import numbers
from mlx_gpt.check.doctor.level.ngrams import NGrams
from mlx_gpt.check.doctor.level.training import last_line, rounded, still_falling, untrained_positions
from mlx_gpt.check.doctor.report import TIME, Report


def case_of(given: dict[str, Any]) -> Case:
    given = dict(given)
    return Case(given, given.pop("vocab_size"), given.pop("n_positions"), minutes=10)


def examined(given: dict[str, Any], *more: str) -> Report:
    """Return the report of the checks of the level, and of others by code."""
    chosen = [one for one in CHECKS if group_of(one.code) == "level" or one.code in more]
    return run_checks(case_of(given), chosen)


def faults(report: Report) -> list[str]:
    return [finding.code for finding in report.findings if finding.severity == "fault"]


NEEDED = {"forward", "vocab_size", "n_positions", "sample", "sample_settings", "train_ids", "val_ids", "decode"}
NEEDED |= {"val_loss", "metrics"}


SLOW = {"learned by heart"}  # trains until it is


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAULTS])
def test_a_planted_finding_is_named_and_no_fault_beside_it(name: str) -> None:
    fault = FAULTS[name]
    given = fault.plant(Base(fault.sizes[0], 1, fault.states[0]))
    report = examined({name: value for name, value in given.items() if name in NEEDED})
    (named,) = (one for one in report.findings if one.code == fault.code)
    assert faults(report) == [fault.code] * (named.severity == "fault")


def test_what_a_leak_does_to_the_samples_is_its_consequence() -> None:
    base = Base(0, 0, trained=True)

    def forward(ids: np.ndarray) -> np.ndarray:
        logits = base.forward(ids)
        np.put_along_axis(logits[:, :-1], ids[:, 1:, None], 9.0, axis=-1)  # the next token, inside a window
        return logits

    given = base.arguments(forward=forward, sample=base.sampler(forward=forward), val_loss=None, metrics=None)
    (leak,) = (one for one in examined(given, "future-leak").findings if one.severity == "fault")
    assert (leak.code, leak.evidence["consequences"]) == ("future-leak", ["samples-worse-than-loss"])


@pytest.mark.parametrize("fault", ["seeded in each step", "rate of 0"])
def test_a_high_loss_is_the_consequence_of_wrong_training(fault: str) -> None:
    planted = {**planted_data.FAULTS, **planted_optimisation.FAULTS}[fault]
    report = examined(planted.plant(Base(0, 0)), planted.code)
    named = next(finding for finding in report.findings if finding.code == planted.code)
    assert named.evidence["consequences"] == ["undertrained", "as-good-as-its-loss"]
    assert not {"undertrained", "as-good-as-its-loss"} & {finding.code for finding in report.findings}


def test_positions_that_no_row_of_the_batches_reaches_are_named() -> None:
    base = Base(1, 1, True)
    given = base.arguments()

    def forward(ids: np.ndarray) -> np.ndarray:
        logits = base.forward(ids)
        logits[:, 16:] *= 0.3
        return logits

    def short_rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((x[:, :16], y[:, :16]) for x, y in base.batches())

    assert untrained_positions(case_of(given)) is None
    assert untrained_positions(case_of({**given, "forward": forward})) is None  # trained, but badly
    found = untrained_positions(case_of({**given, "forward": forward, "batches": short_rows}))
    assert found is not None
    assert found["evidence"] == {"trained_positions": 16}
    assert found["measured"] > found["expected"] + 0.1


def test_a_sampler_that_divides_by_a_temperature_of_0_and_raises_has_no_fault() -> None:
    base = Base(0, 0, trained=True)
    draw = base.sampler()

    def sample(ids: list[int], n: int, temperature: float = 1.0) -> list[int]:
        assert temperature > 0
        return draw(ids, n, temperature=temperature)

    assert not faults(examined(base.arguments(sample=sample, sample_many=None, sample_settings={"temperature"})))


@pytest.mark.parametrize(("skipped", "named"), [({}, True), ({"sampler-too-narrow": TIME}, False)])
def test_text_is_as_good_as_its_loss_only_where_sampling_had_time(skipped: dict[str, str], named: bool) -> None:
    (check,) = (one for one in CHECKS if one.code == "as-good-as-its-loss")
    examination = Examination(case_of(Base(0, trained=True).arguments()), [check])
    examination.skipped |= skipped
    assert ("as-good-as-its-loss" in [finding.code for finding in examination.run().findings]) == named


def test_few_texts_of_a_narrow_sampler_are_not_as_good_as_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "DRAWS", 30)
    base = Base(0, trained=True)
    sampler = base.sampler("sampler-too-narrow")
    report = examined(base.arguments(sample=lambda ids, n, **chosen: sampler(ids, n, **chosen)))
    assert "as-good-as-its-loss" not in [finding.code for finding in report.findings]


# Loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_model() -> None:
    base = Base(1, 0, trained=True)
    loss = validation_loss(case_of(base.arguments()))
    assert abs(loss.mean - base.mean_loss(base.val_ids)) < 4 * loss.error
    assert 0 < loss.error < 0.05


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_probabilities_of_an_n_gram_model_sum_to_one(n: int) -> None:
    ids = np.random.default_rng(0).integers(0, 6, 200)
    model = NGrams(ids, 7, n)
    for context in ([0, 1], [6, 6], [3, 6]):
        texts = [[*context[3 - n :], i] if n > 1 else [i] for i in range(7)]
        assert sum(np.exp(-model.losses(np.array(text))[0]) for text in texts) == pytest.approx(1)


def test_a_bigram_model_is_the_formula_of_kneser_and_ney() -> None:
    ids = np.random.default_rng(1).integers(0, 5, 300)
    model, pairs = NGrams(ids, 5, 2), Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    d, lower = (order.discount for order in reversed(model.orders))
    for a, b in [(0, 1), (4, 2)]:
        total = sum(count for (first, _), count in pairs.items() if first == a)
        types = sum(first == a for first, _ in pairs)
        before = sum(second == b for _, second in pairs)
        unigram = (before - lower) / len(pairs) + lower * 5 / len(pairs) / 5
        expected = (max(pairs[a, b] - d, 0) + d * types * unigram) / total
        assert model.losses(np.array([a, b]))[0] == pytest.approx(-np.log(expected))


def test_the_rungs_descend_and_random_ids_have_one() -> None:
    losses = [*ladder(case_of(Base(1).arguments())).losses.values()]
    assert losses == sorted(losses, reverse=True)
    ids = np.random.default_rng(0).integers(0, 9, 5000)
    random = ladder(
        case_of({"forward": None, "vocab_size": 9, "n_positions": 8, "train_ids": ids, "val_ids": ids[:99]})
    )
    assert min(random.losses.values()) == pytest.approx(np.log(9), abs=0.05)


def test_the_best_possible_loss_is_shown_where_it_is_known() -> None:
    rungs = ladder(case_of({**Base(1).arguments(), "best_loss": 0.25}))
    assert str(rungs).endswith("best possible 0.25")
    assert rungs.rung(0.0) == "trigram"


def test_a_text_of_the_n_gram_model_has_its_loss() -> None:
    base = Base(1)
    model = NGrams(base.train_ids, base.config.vocab_size, 3)
    text = model.sample(base.val_ids[:2], 2000, np.random.default_rng(0))
    assert model.losses(np.array(text)).mean() == pytest.approx(model.losses(base.train_ids).mean(), rel=0.2)


# Training -----------------------------------------------------------------------------------------------------------


def logged(losses: Any, **fixed: float) -> list[dict[str, float]]:
    return [{"step": 10.0 * (i + 1), "val_loss": float(loss), **fixed} for i, loss in enumerate(losses)]


def test_a_loss_that_still_falls_is_too_early_and_one_that_has_ended_is_not() -> None:
    steps = np.arange(1, 41)
    falls = numbers(logged(5 - 0.5 * np.log2(steps)))
    found = still_falling(falls, 5.0, per_step=100)
    assert found is not None
    assert found["measured"] == pytest.approx(0.5)
    assert found["evidence"]["more_tokens"] == pytest.approx(40_000)
    assert still_falling(numbers(logged(2 + 3 / steps**2)), 5.0, per_step=100) is None
    assert still_falling(falls, 5.0, n_parameters=1000, per_step=100) is None  # 40 tokens per parameter
    assert still_falling([], 5.0, n_parameters=10) is None


@pytest.mark.parametrize(("n", "text"), [(4_123_000, "4.1M"), (999, "1k"), (12, "12"), (2.4e9, "2.4B")])
def test_a_number_of_tokens_has_two_digits(n: float, text: str) -> None:
    assert rounded(n) == text


def test_a_log_is_read_as_it_is() -> None:
    rows: list[Any] = [{"step": 1, "loss": float("nan")}, {"loss": 2}, "cut off", {"step": "3", "val_loss": None}, {}]
    assert numbers(rows) == [{"step": 1.0}, {"step": 3.0}]
    report = examined(Base(0).arguments(metrics=rows))
    assert not faults(report)


def test_less_evidence_gives_fewer_findings_and_no_fault() -> None:
    given = Base(0).arguments()
    few = {name: given[name] for name in ("forward", "vocab_size", "n_positions", "sample")}
    assert not faults(examined(few))
    for ids in ([1], [1, 2], np.arange(20) % 9, [99_999, 0] * 50):
        assert not faults(examined({**few, "val_ids": ids, "train_ids": ids, "val_loss": 3.4}))


def test_training_ends_with_a_line_only_where_there_is_something_to_say() -> None:
    base = Base(1)
    data = base.train_ids, base.val_ids, base.config.vocab_size
    rises = numbers(FAULTS["validation loss rises"].plant(base)["metrics"])
    assert last_line([], *data, loss=1.0, n_parameters=30_000) == ""
    line = last_line([{"step": 9.0, "tokens": 4_000.0}], *data, loss=2.5, n_parameters=30_000)
    assert line.startswith("undertrained: the loss of 2.50 is above that of n-gram models (chance 3.95, unigram 3.07")
    assert line.endswith("about 596k more tokens are needed")
    assert last_line(rises, *data, loss=1.0, n_parameters=30_000).startswith("overfitted: the validation loss rose")
    assert last_line([], np.zeros(3, int), np.zeros(2, int), 5, loss=1.0, n_parameters=10) == ""
