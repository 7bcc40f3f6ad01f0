"""The report: findings in the order in which to repair them, and which checks were made and skipped."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_gpt.check.doctor.arguments import FUNCTIONS
from mlx_gpt.check.doctor.checks import symptom_of
from mlx_gpt.check.doctor.codes import GROUPS, severity_of
from mlx_gpt.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

STYLES = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
SEVERITIES = tuple(STYLES)
TIME = "minutes"  # the reason for a check that was skipped for lack of time


class ReportLine:
    """A paragraph of a report: one printable line, its style, and its indentation."""

    def __init__(self, text: str = "", style: str = "", indent: int = 0):
        self.text, self.style, self.indent = one_line(text), style, indent


@dataclass(frozen=True)
class Finding:
    """One cause, with the measurement that shows it.

    ``why`` says what was measured; ``measured`` and ``expected`` are that value and the one a healthy model has.
    ``evidence`` holds further values: numbers, strings, lists and dicts. ``evidence["consequences"]`` are the codes of
    the findings that this one explains.
    """

    code: str
    severity: str
    measured: Any
    expected: Any
    why: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return as_text(self.lines())

    def lines(self, number: int | None = None) -> Iterator[ReportLine]:
        """Yield the lines of a report about this finding."""
        place = "" if number is None else f"{number}. "
        yield ReportLine(f"{place}{self.severity.capitalize()}: {self.code}", STYLES[self.severity])
        for text in filter(None, (symptom_of(self.code), self.why)):
            yield ReportLine(sentence(text), indent=3)
        measured, expected = shortened(self.measured), shortened(self.expected)
        if str(self.measured) != self.why and measured != expected:
            other = "Expected" if self.severity == "fault" else "Compared with"
            yield ReportLine(f"Measured: {measured}. {other}: {expected}.", "dim", 3)
        remedy = "Repair" if self.severity == "fault" else "Advice"
        yield ReportLine(f"{remedy}: {sentence(self.remedy, False)}", "bold", 3)
        found = self.evidence.get("consequences", ())
        if consequences := [code for code in found if severity_of(code) != "note"]:
            yield ReportLine(f"This also explains: {', '.join(consequences)}.", "", 3)


@dataclass(frozen=True)
class Report:
    """Findings, the first to repair first; the codes of checks that were made; and of those that were not.

    ``skipped`` maps a code to the argument of ``examine`` that would allow the check, or to another reason.
    """

    findings: list[Finding]
    examined: list[str]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """True if there is no fault; warnings and notes may remain."""
        return all(finding.severity != "fault" for finding in self.findings)

    def to_json(self) -> str:
        """Return the report as JSON."""
        findings = [{name: plain(value) for name, value in vars(finding).items()} for finding in self.findings]
        report = {"ok": self.ok, "findings": findings, "examined": self.examined, "skipped": self.reasons()}
        return json.dumps(report, indent=2, allow_nan=False)

    def __str__(self) -> str:
        return as_text(self.lines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        for line in self.lines():
            for part in wrap(line.text, options.max_width - line.indent) or [""]:
                yield Text(" " * line.indent + part, line.style)

    def lines(self) -> Iterator[ReportLine]:
        """Yield the report: the verdict, the findings, what was ruled out, and what was not examined."""
        yield ReportLine(self.verdict(), "bold green" if self.ok else "bold red")
        for number, finding in enumerate(self.findings, 1):
            yield ReportLine()
            yield from finding.lines(number)
        explained = {code for finding in self.findings for code in finding.evidence.get("consequences", ())}
        found = explained | {finding.code for finding in self.findings}
        sound = [code for code in self.examined if code not in found]
        if sound:
            yield ReportLine()
            yield ReportLine(f"Ruled out by {counted(len(sound), 'check')}:", "dim")
            for group, codes in GROUPS.items():
                if inside := [code for code in codes if code in sound]:
                    yield ReportLine(f"{group}: {', '.join(inside)}", "dim", 3)
        if missing := {code: reason for code, reason in self.reasons().items() if code not in found}:
            yield ReportLine()
            yield ReportLine("Not examined:", "dim")
            for reason in dict.fromkeys(missing.values()):
                skipped = shortened_codes([code for code in missing if missing[code] == reason])
                yield ReportLine(f"{reason}: {skipped}", "dim", 3)

    def reasons(self) -> dict[str, str]:
        """Return in words, for each check that was skipped, what it needs, what failed, or that time was short."""
        failed = {finding.evidence.get("function") for finding in self.findings}

        def reason(lack: str) -> str:
            if lack == TIME:
                return "for lack of time"
            return f"{lack} failed" if lack in failed else f"needs {lack.replace('|', ' or ')}"

        return {code: reason(lack) for code, lack in self.skipped.items()}

    def verdict(self) -> str:
        """Return the result in a sentence or two."""
        numbers = {severity: sum(finding.severity == severity for finding in self.findings) for severity in SEVERITIES}
        counts = [counted(n, severity) for severity, n in numbers.items() if n]
        late = sum(reason == TIME for reason in self.skipped.values())
        more = f" There was no time for {counted(late, 'check')}: give more minutes." if late else ""
        if not self.ok:
            first = " Repair the first one first: it may explain others." if numbers["fault"] > 1 else ""
            return f"Found: {', '.join(counts)}.{first}{more}"
        if not self.examined:
            return f"Nothing could be examined.{more}"
        return f"No fault was found{''.join(f', {count}' for count in counts)}.{more}"


def sentence(text: str, capital: bool = True) -> str:
    """Return a text as a sentence; a name or code at its beginning stays in lower case."""
    text = text.rstrip(".")
    first = text.partition(" ")[0].rstrip(",:;")
    capital = capital and first.replace("-", "").isalpha() and first not in FUNCTIONS
    return f"{text[:1].upper() if capital else text[:1]}{text[1:]}."


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a paragraph; codes, which have hyphens, stay whole."""
    return textwrap.wrap(text, max(20, width), break_on_hyphens=False)


def counted(n: int, name: str) -> str:
    return f"{n} {name}{'' if n == 1 else 's'}"


def shortened_codes(codes: list[str]) -> str:
    """Return up to three codes by name, and more as numbers by group."""
    if len(codes) <= 3:
        return ", ".join(codes)
    groups = {group: sum(code in codes for code in members) for group, members in GROUPS.items()}
    return ", ".join(f"{n} of {group}" for group, n in groups.items() if n)


def as_text(lines: Iterable[ReportLine]) -> str:
    return "\n".join(" " * line.indent + line.text for line in lines)


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: arrays as lists, numbers that are not finite and other objects as strings."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def shortened(value: Any) -> str:
    """Return a value on one line: numbers to three digits, the first five items of a list."""
    value = plain(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"[{', '.join(shortened(item) for item in value[:5])}{', …' if len(value) > 5 else ''}]"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shortened(item)}" for key, item in list(value.items())[:5])
    return str(value)
