"""The list of checks: each a function from the case to at most one finding.

A check is registered with its code. Its docstring's first line is the symptom in one sentence, which reports and the
table in ``README.md`` repeat. The rest says what is measured, gives the threshold and what healthy and faulty models
were measured to have, and names the source. Differences of logits are relative to the logits' standard deviation.
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
    """A check with its code and the arguments that it needs.

    ``explains``: codes of findings that its own finding explains. ``explained_by``: codes that explain its finding, or
    groups of which every fault does.
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

    The function returns None, or the fields of a finding: ``dict(measured=, expected=, why=, remedy=, evidence=)``.
    Two more fields may be there: ``separate=True`` if the check measured that its finding is no consequence of the
    earlier ones in ``case.found``, and ``explains=`` in place of the argument if it measured what it explains.
    """

    def register(function: Callable[[Case], Any]) -> Callable[[Case], Any]:
        CHECKS.append(DoctorCheck(code, function, needs, tuple(explains), tuple(explained_by)))
        CHECKS.sort(key=lambda check: (EXAMINED.index(group_of(check.code)), ORDER[check.code]))
        return function

    return register


# Symptoms of the codes that have no check of their own: they are found whenever a function of the user's is called.
OF_CALLS = {
    "raises": "One of your functions raises an error for valid input",
    "wrong-shape": "One of your functions returns something of the wrong type or shape",
    "too-slow": "One of your functions takes too long to be examined, or never returns",
}


def symptom_of(code: str) -> str:
    """Return what a user would say or see, in one sentence without its full stop; "" for a code without a check."""
    return next((check.symptom for check in CHECKS if check.code == code), OF_CALLS.get(code, ""))


class NotApplicable(Exception):
    """A check cannot be made with the arguments given; the message completes "needs ..." in the report."""
