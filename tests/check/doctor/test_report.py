"""The report: the verdict first, then findings in sentences, what was ruled out, and what was not examined."""

from __future__ import annotations

import io
import json

import numpy as np
from rich.console import Console

from mlx_gpt.check.doctor import Finding, Report
from mlx_gpt.check.doctor.checks import CHECKS

LEAK = Finding(
    "future-leak",
    "fault",
    np.float32(0.8312),
    0,
    "changing token 5 changes earlier logits by up to 0.83",
    "mask later keys",
    {"consequences": ["samples-worse-than-loss"], "changed": np.array([1.0, np.nan])},
)
SHORT = Finding("corpus-too-small", "warning", 10, 1000, "10 tokens\x1b[2J for\n1,000 parameters", "use more text.")
FAILED = Finding("raises", "fault", "sample raised", "a result", "sample raised", "mend it", {"function": "sample"})
EXAMINED = ["token-blind", "future-leak", "samples-worse-than-loss", "corpus-too-small"]
SKIPPED = {"cache-mismatch": "cached", "undertrained": "minutes", "mis-decoded-text": "train_text|decode"}
REPORT = Report([LEAK, SHORT], EXAMINED, SKIPPED)


def printed(report: Report, width: int, **options: bool) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(report)  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_report_reads_as_a_letter() -> None:
    (symptom,) = (check.symptom for check in CHECKS if check.code == "future-leak")
    lines = str(REPORT).splitlines()
    assert lines[:8] == [
        "Found: 1 fault, 1 warning. There was no time for 1 check: give more minutes.",
        "",
        "1. Fault: future-leak",
        f"   {symptom}.",
        "   Changing token 5 changes earlier logits by up to 0.83.",
        "   Measured: 0.831. Expected: 0.",
        "   Repair: mask later keys.",
        "   This also explains: samples-worse-than-loss.",
    ]
    end = lines[lines.index("Ruled out by 1 check:") :]
    assert end[1:] == [
        "   inputs: token-blind",
        "",
        "Not examined:",
        "   needs cached: cache-mismatch",
        "   for lack of time: undertrained",
        "   needs train_text or decode: mis-decoded-text",
    ]


def test_control_characters_of_a_model_are_escaped_and_no_colour_is_piped() -> None:
    assert "10 tokens\\x1b[2J for 1,000 parameters." in str(REPORT)
    assert "\x1b" not in printed(REPORT, 100)
    assert "\x1b[2J" not in printed(REPORT, 100, force_terminal=True)


def test_lines_fit_the_width_and_have_no_trailing_spaces() -> None:
    for width in (40, 80, 120):
        lines = printed(REPORT, width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)


def test_the_verdict_is_the_first_line() -> None:
    assert str(Report([], ["token-blind"], {})).startswith("No fault was found.\n")
    assert str(Report([SHORT], EXAMINED, {})).startswith("No fault was found, 1 warning.\n")
    assert str(Report([LEAK, FAILED], [], {})).startswith("Found: 2 faults. Repair the first one first")
    assert str(Report([], [], {})) == "Nothing could be examined."


def test_checks_that_a_failing_function_prevents_are_not_called_missing() -> None:
    assert "   sample failed: prompt-ignored" in str(Report([FAILED], [], {"prompt-ignored": "sample"}))


def test_json_has_plain_values() -> None:
    found = json.loads(REPORT.to_json())
    assert found["ok"] is False
    assert found["findings"][0]["evidence"]["changed"] == [1.0, "nan"]
    assert found["skipped"].keys() == SKIPPED.keys()
    assert {"for lack of time", "needs train_text or decode"} <= {*found["skipped"].values()}
    json.loads(Report([Finding("raises", "fault", "\udc80", 0, "", "")], [], {}).to_json().encode())
