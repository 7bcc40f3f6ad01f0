"""A few runs of the doctor's figures: planted faults of each group are named alone, healthy models have none."""

from __future__ import annotations

import pytest
from helpers.doctor_figures import GROUPS, Run, faults_of, misses, result_of, runs

from mlx_gpt.check.doctor.codes import GROUPS as CODES


def test_every_code_has_a_planted_fault() -> None:
    planted = {one.code for group in GROUPS for one in faults_of(group).values()}
    assert {code for codes in CODES.values() for code in codes} <= planted


@pytest.mark.slow
@pytest.mark.parametrize("group", [group for group in GROUPS if group != "tutorial"])
def test_a_planted_fault_is_named_alone(group: str) -> None:
    first = next(run for run in runs([group], quick=True) if run.library == "mlx" and not run.trained)
    assert not misses([result_of(first)])


@pytest.mark.slow
@pytest.mark.parity
def test_a_planted_fault_of_a_tutorial_is_named_alone() -> None:
    assert not misses([result_of(run) for run in [*runs(["tutorial"], quick=True)][::5]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["this package's, bfloat16", "ALiBi", "parallel blocks", "one row", "returns float16"])
def test_a_healthy_model_has_no_fault(name: str) -> None:
    assert not misses([result_of(Run("healthy", name))])


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["transformers: BLOOM", "PyTorch's own layers, post-norm"])
def test_a_healthy_torch_model_has_no_fault(name: str) -> None:
    assert not misses([result_of(Run("healthy", name))])
