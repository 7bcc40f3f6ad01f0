"""The doctor's checks of weights name each planted fault alone, pass healthy models, and restore the parameters."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.plain_gpt import PlainConfig, PlainGPT
from helpers.planted import Base, Given
from helpers.planted_weights import FAULTS

from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import make_case, run_checks
from mlx_gpt.check.doctor.report import Report

OURS = [check for check in CHECKS if check.find.__module__.startswith("mlx_gpt.check.doctor.weights")]


def examined(given: Given) -> Report:
    return run_checks(make_case({**given, "minutes": 10.0}), OURS)


def codes(given: Given) -> list[str]:
    return [finding.code for finding in examined(given).findings]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_alone(name: str) -> None:
    planted = FAULTS[name]
    given = planted.plant(Base(planted.sizes[0], 0, trained=planted.states == (True,)))
    before = {name: np.array(value) for name, value in given["parameters"]().items()}
    report = examined(given)
    assert [finding.code for finding in report.findings] == [planted.code]
    report.to_json()
    after = given["parameters"]()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


@pytest.mark.parametrize("size", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sound_model_given_as_functions_has_no_finding(size: int) -> None:
    report = examined(Base(size).arguments())
    assert report.findings == []
    assert report.skipped.keys() <= {"precision-loss"}


@pytest.mark.parametrize("fault", ["heads-mixed-up", "residual-after-norm", "mlp-not-added"])
def test_a_module_is_looked_into(fault: str) -> None:
    code = "layer-without-effect" if fault == "mlp-not-added" else fault
    assert codes({"forward": PlainGPT(PlainConfig(layers=2), {fault})}) == [code]
