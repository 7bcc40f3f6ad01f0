"""Findings about a setting."""

from __future__ import annotations

from typing import Any

REMEDIES = {
    "setting-ignored": "hand {} on to where the next id is drawn, and use the changed logits there",
    "setting-inverted": "check the direction of {}: divide by the temperature, keep the most probable ids",
    "setting-wrong": "check where {} cuts: top-k keeps k ids, top-p the fewest whose sum reaches p, and temperature 1, "
    "top_k 0 and top_p 1 are off",
}


def setting_fault(code: str, setting: str, value: float, why: str, draws: int) -> dict[str, Any]:
    return {
        "measured": why,
        "expected": f"the draws of {setting} = {value:g}",
        "why": why,
        "remedy": REMEDIES[code].format(setting),
        "evidence": {"setting": setting, "value": value, "draws": draws},
    }
