"""The doctor finds no fault in GPTs of different authors and styles, and names each mistake that people ask about."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import foreign_gpts as ours

from mlx_gpt.check.doctor import examine

try:
    from helpers import foreign_torch_gpts as theirs
except ImportError:
    theirs = None  # type: ignore[assignment]

LIBRARIES = [library for library in (ours, theirs) if library is not None]
PEOPLE = {name: build for library in LIBRARIES for name, build in library.PEOPLE.items()}
MISTAKES = {key: codes for library in LIBRARIES for key, codes in library.MISTAKES.items()}
FAST = {"pico", "library", "encoder"}  # a forward pass, or little more


def cases(entries: Any) -> list[Any]:
    names = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    return [pytest.param(*one, marks=() if one[0] in FAST else pytest.mark.slow, id=", ".join(one)) for one in names]


def faults(person: str, mistake: str = "") -> list[str]:
    report = examine(**PEOPLE[person](mistake), minutes=1.0)
    return [finding.code for finding in report.findings if finding.severity == "fault"]


@pytest.mark.parametrize("person", cases(PEOPLE))
def test_a_healthy_gpt_has_no_fault(person: str) -> None:
    assert faults(person) == []


@pytest.mark.parametrize(("person", "mistake"), cases(MISTAKES))
def test_a_mistake_is_the_only_fault_by_its_code(person: str, mistake: str) -> None:
    (fault,) = faults(person, mistake)
    assert fault in MISTAKES[person, mistake].split("|")
