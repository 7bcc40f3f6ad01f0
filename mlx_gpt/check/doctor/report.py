"""What the doctor found: findings, most explanatory first, and what was examined and skipped."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import RenderableType

SEVERITIES = ("fault", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One cause, with the measurement that shows it.

    ``measured`` and ``expected`` are in the unit that ``why`` names. ``evidence`` holds further values, plain numbers,
    strings, lists and dicts; ``evidence["consequences"]`` the codes of findings that this one explains.
    """

    code: str
    severity: str
    measured: Any
    expected: Any
    why: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.severity.upper()} {self.code}: {self.why}"]
        lines.append(f"  measured {shortened(self.measured)}, expected {shortened(self.expected)}")
        lines.append(f"  remedy: {self.remedy}")
        if consequences := self.evidence.get("consequences"):
            lines.append(f"  this also explains: {', '.join(consequences)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """Findings, the one that explains most first; the checks that ran; and those that did not, with what they need.

    ``skipped`` maps a check to the argument of ``examine`` that would allow it, or to the reason.
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
        report = {"ok": self.ok, "findings": findings, "examined": self.examined, "skipped": self.skipped}
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        parts = [str(finding) for finding in self.findings] or ["Nothing wrong was found."]
        parts.append(f"examined: {', '.join(self.examined) or 'nothing'}")
        if self.skipped:
            parts.append("skipped: " + ", ".join(f"{check} (needs {what})" for check, what in self.skipped.items()))
        return "\n\n".join(parts)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from mlx_gpt.terminal import escaped

        styles = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
        texts = []
        for finding in self.findings:
            head, _, rest = escaped(str(finding)).partition("\n")
            texts.append(Text.assemble((head, styles[finding.severity]), "\n", rest, "\n"))
        verdict = Text(
            "No fault was found." if self.ok else f"{sum(f.severity == 'fault' for f in self.findings)} faults.",
            style="green" if self.ok else "bold red",
        )
        counts = Text(f"{len(self.examined)} checks examined, {len(self.skipped)} skipped.", style="dim")
        return Group(*texts, verdict, counts)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: arrays as lists, numbers that are not finite as strings, other objects as text."""
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
