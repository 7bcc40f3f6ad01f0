"""The doctor finds no fault in GPTs of different authors and styles, and names each mistake that people ask about."""

from __future__ import annotations

import pytest
from helpers.doctor_figures import Run, foreign, misses, result_of

FAST = ("library", "encoder")  # a forward pass, no sampler
OPEN = {  # not named yet, or not alone
    "library, -1e9 in float16",  # named, unless float16 on a slow CPU takes too long
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    unnamed = [pytest.mark.xfail(reason="not named yet, or not alone")] if name in OPEN else []
    return unnamed + ([] if name.startswith(FAST) else [pytest.mark.slow])


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name), id=name) for name in foreign()])
def test_a_sound_gpt_has_no_fault_and_a_mistake_is_the_only_one_by_its_code(name: str) -> None:
    assert not misses([result_of(Run("foreign", name))])
