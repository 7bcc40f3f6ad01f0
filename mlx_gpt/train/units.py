"""Numbers and durations in readable form."""

from __future__ import annotations


def format_large(value: float, unit: str = "") -> str:
    """Format a large number with a prefix: 2_500_000 bytes -> ``2.5 MB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def format_time(seconds: float) -> str:
    """Format a duration: 61 -> ``1:01``; 3661 -> ``1:01:01``; a week and more in days."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    if minutes >= 7 * 24 * 60:
        return f"{minutes / (24 * 60):.0f} days"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
