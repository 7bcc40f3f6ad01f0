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
FAST = {"library", "encoder"}  # a forward pass, no sampler
OPEN = {  # not named yet, or not alone
    ("lecture", "position 0 everywhere"),
    ("lecture", "positions forgotten"),
    ("library", "-1e9 in float16"),  # named, unless float16 on a slow CPU takes too long
}


def marks(name: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    unnamed = [pytest.mark.xfail(reason="not named yet, or not alone")] if name in OPEN else []
    return unnamed + ([] if name[0] in FAST else [pytest.mark.slow])


def cases(entries: Any) -> list[Any]:
    names = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    return [pytest.param(*name, marks=marks(name), id=", ".join(name)) for name in names]


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
