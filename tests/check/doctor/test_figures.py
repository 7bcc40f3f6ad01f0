"""Planted faults of every group are named alone, and healthy models of many makes have none: a part of the figures."""

from __future__ import annotations

import pytest
from helpers.doctor_figures import GROUPS, Run, faults_of, misses, result_of, runs
from helpers.healthy_gpts import FUNCTIONS, MODULES, TRANSFORMERS

from mlx_gpt.check.doctor.codes import GROUPS as CODES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", GROUPS)
def test_a_planted_fault_is_named_alone(group: str) -> None:
    some = [run for run in runs([group], quick=True) if run.library == "mlx"]
    assert not misses([result_of(run) for run in some[::6]])


def test_every_code_has_a_planted_fault() -> None:
    planted = {one.code for group in GROUPS for one in faults_of(group).values()}
    assert {code for codes in CODES.values() for code in codes} <= planted


@pytest.mark.parametrize("name", [*[*MODULES][::8], *[*FUNCTIONS][::8]])
def test_a_healthy_model_has_no_fault(name: str) -> None:
    assert not misses([result_of(Run("healthy", name))])


@pytest.mark.parity
@pytest.mark.parametrize("name", [*TRANSFORMERS][::4])
def test_a_healthy_model_of_transformers_has_no_fault(name: str) -> None:
    assert not misses([result_of(Run("healthy", name))])
