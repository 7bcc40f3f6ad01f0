"""The list of checks: each a function from the case to at most one finding.

A check is registered with its code. Its docstring's first line is the symptom or property in one sentence, which the
table in ``README.md`` repeats; the rest gives the measure, its threshold with the margin, and the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.codes import EXAMINED, ORDER, group_of, severity_of

Found = dict[str, Any] | None  # what a check returns: the fields of a finding, or None


@dataclass(frozen=True)
class DoctorCheck:
    """A check with its code, the arguments it needs, and the codes of findings that it explains if it finds.

    ``explained_by`` are codes, or groups whose faults explain its own finding.
    """

    code: str
    find: Callable[[Case], dict[str, Any] | None]  # the fields of a finding
    needs: tuple[str, ...]
    explains: tuple[str, ...]
    explained_by: tuple[str, ...] = ()

    @property
    def severity(self) -> str:
        return severity_of(self.code)

    @property
    def symptom(self) -> str:
        return (self.find.__doc__ or "").partition("\n")[0].rstrip(".")

    def missing(self, case: Case) -> str | None:
        """Return the first argument that this check needs and was not given; one of ``a|b`` is enough."""
        return next((need for need in self.needs if not any(case.has(name) for name in need.split("|"))), None)


CHECKS: list[DoctorCheck] = []  # in the order in which they are examined


def check(
    code: str, *needs: str, explains: Sequence[str] = (), explained_by: Sequence[str] = ()
) -> Callable[[Callable[[Case], Any]], Callable[[Case], Any]]:
    """Register a check: ``@check("future-leak", "forward", explains=("samples-worse-than-loss",))``.

    The function returns None, or ``dict(measured=, expected=, why=, remedy=, evidence=)`` for a finding; with
    ``separate=True`` where it measured that the finding is no consequence of what ``case.found`` holds already, and
    ``explains=`` where it measured which codes it explains.
    """

    def register(function: Callable[[Case], Any]) -> Callable[[Case], Any]:
        CHECKS.append(DoctorCheck(code, function, needs, tuple(explains), tuple(explained_by)))
        CHECKS.sort(key=lambda check: (EXAMINED.index(group_of(check.code)), ORDER[check.code]))
        return function

    return register


# The symptoms of codes that are found when a function is called, by no check of their own.
OF_CALLS = {
    "raises": "One of your functions raises an error for valid input",
    "wrong-shape": "One of your functions returns something of the wrong type or shape",
    "too-slow": "One of your functions takes too long to be examined, or never returns",
}


def symptom_of(code: str) -> str:
    """Return what a user would say or see, in one sentence without its full stop; "" for a code without a check."""
    return next((check.symptom for check in CHECKS if check.code == code), OF_CALLS.get(code, ""))


class NotApplicable(Exception):
    """A check cannot be made with what was given; the message says what it needs."""
