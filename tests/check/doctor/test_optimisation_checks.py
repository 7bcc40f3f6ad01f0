"""The doctor's checks of loss, gradient and step name each planted fault, and pass healthy ways to train."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.optimisation_accumulation import accumulated
from helpers.optimisation_losses import LOSSES
from helpers.optimisation_training import cross_entropy, sgd, trained_with
from helpers.planted import Base, Given
from helpers.planted_optimisation import FAULTS, HEALTHY

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import make_case, run_checks
from mlx_gpt.check.doctor.report import Report

OURS = [check for check in CHECKS if check.find.__module__.startswith("mlx_gpt.check.doctor.optimisation")]


def examined(given: Given) -> Report:
    """Run the checks of this group alone, and compare the parameters before and after."""
    arguments: dict[str, Any] = dict(given)
    vocab_size, n_positions = arguments.pop("vocab_size"), arguments.pop("n_positions")
    before = {name: np.array(value) for name, value in given["parameters"]().items()}
    report = run_checks(Case(arguments, vocab_size, n_positions, minutes=10), OURS)
    after = given["parameters"]()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    return report


def small_base(states: tuple[bool, ...] = (False,)) -> Base:
    return Base(0, 0, trained=states == (True,))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_alone(name: str) -> None:
    planted = FAULTS[name]
    given = planted.plant(small_base(planted.states))
    if name in LOSSES:
        given = {key: value for key, value in given.items() if key not in ("step", "new_step", "gradient")}
    report = examined(given)
    named = [finding.code for finding in report.findings]
    assert named[0] == planted.code
    assert {*named[1:]} <= {"training-mode-without-dropout-effect"}  # a note
    report.to_json()


def test_the_remedy_for_steps_without_effect_names_the_learning_rate() -> None:
    (finding,) = (one for one in examined(FAULTS["rate of 0"].plant(small_base())).findings if one.severity == "fault")
    assert "learning rate" in finding.remedy


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_way_to_train_has_no_fault(name: str) -> None:
    assert all(finding.severity == "note" for finding in examined(HEALTHY[name](small_base())).findings)


@pytest.mark.parametrize("seed", range(3))
def test_batches_of_one_row_are_no_sum(seed: int) -> None:
    base = Base(0, seed, trained=True)
    given = trained_with(base, batches=lambda: ((x[:1], y[:1]) for x, y in base.batches()))
    del given["gradient"]
    assert all(finding.severity == "note" for finding in examined(given).findings)


def test_a_loss_that_shifts_is_no_fault_of_the_gradient_taken_from_the_module() -> None:
    base = small_base()
    model, sizes = base.model, {"vocab_size": base.config.vocab_size, "n_positions": base.config.n_positions}

    def loss(x: Any, y: Any) -> float:
        return float(cross_entropy(model(mx.array(x))[:, :-1], mx.array(y)[:, 1:]).item())

    report = run_checks(make_case({"forward": model, "loss": loss, "minutes": 10, **sizes}), OURS)
    assert "future-leak-in-gradient" in report.examined
    assert report.ok


def test_a_sum_of_two_parts_under_dropout_is_not_ruled_out() -> None:
    base = small_base().with_faults(dropout=0.1)
    report = examined(trained_with(base, optimizer=sgd(), gradients=accumulated(2, 1.0)))
    assert report.skipped["accumulation-differs"] == "a step without dropout"


def test_nesterov_momentum_under_dropout_is_not_a_sum_of_two_parts() -> None:
    # the first update is 1.9 times the gradient
    base = small_base().with_faults(dropout=0.1)
    report = examined(trained_with(base, optimizer=sgd(momentum=0.9, dampening=0.0, nesterov=True)))
    assert all(finding.severity == "note" for finding in report.findings)
