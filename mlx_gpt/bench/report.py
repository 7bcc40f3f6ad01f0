"""The results as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_gpt.bench.sides import OURS

ROWS = {  # key in the results: label, factor, format
    "tokens_per_second": ("tokens/s", 1, ",.0f"),
    "spread": ("lowest, highest", 1, ",.0f"),
    "prefill_tokens_per_second": ("tokens/s of the prompt", 1, ",.0f"),
    "share_of_limit": ("share of the limit", 1, ".2f"),
    "peak_memory_bytes": ("peak memory of MLX, GB", 1e-9, ".2f"),
    "first_step_seconds": ("first step, s", 1, ".2f"),
    "host_seconds_per_token": ("host time per token, ms", 1e3, ".2f"),
    "kernels_per_token": ("kernels per token", 1, ".0f"),
}


def tables(results: dict[str, Any]) -> list[str]:
    """Return the lines of all results, as Markdown."""
    system = results["system"]
    versions = ", ".join(f"{name} {number}" for name, number in system["versions"].items())
    lines = [
        f"{system['chip']} ({system['device']}), {system['memory_bytes'] / 1e9:.0f} GB, {system['system']}, "
        f"power: {system['power']}; {versions}"
    ]
    if limits := results.get("limits"):
        best = {name: max(sizes.values()) for name, sizes in limits["matrix_product"].items()}
        products = ", ".join(f"{name} {speed / 1e12:.2f}" for name, speed in best.items())
        lines += ["", f"Matrix products, TFLOP/s: {products}. Memory, GB/s: copy {limits['copy'] / 1e9:.1f}, ", ""]
        lines[-2] += f"matrix-vector products {limits['matrix_vector'] / 1e9:.1f}."
    for part in ("training", "generation"):
        found = results.get(part, {})
        if sides := {name: one for name, one in found.items() if "tokens_per_second" in one}:
            lines += [f"| {part} | {' | '.join(sides)} |", "|---" * (1 + len(sides)) + "|"]
            lines += [_row(key, sides) for key in ROWS if any(key in one for one in sides.values())] + [""]
        lines += [f"{part}, {name}, skipped: {one['skipped']}" for name, one in found.items() if "skipped" in one]
    return lines


def _row(key: str, sides: dict[str, dict[str, Any]]) -> str:
    label, factor, form = ROWS[key]

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return ", ".join(format(factor * one, form) for one in (value if isinstance(value, list) else [value]))

    return f"| {label} | {' | '.join(cell(one.get(key)) for one in sides.values())} |"


def write_picture(results: dict[str, Any], path: Path) -> None:
    """Draw each side's tokens/s of training, prompt and text as bars, with the spread."""
    from matplotlib.figure import Figure

    panels = [
        (title, key, {name: one for name, one in results.get(part, {}).items() if key in one})
        for part, key, title in (
            ("training", "tokens_per_second", "training"),
            ("generation", "prefill_tokens_per_second", "prompt"),
            ("generation", "tokens_per_second", "text"),
        )
    ]
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (title, key, sides) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, one in sides.items():
            low, high = one["spread"] if key == "tokens_per_second" else (one[key], one[key])
            axes.bar(name, one[key], color="#c2410c" if name == OURS else "#9ca3af")
            axes.vlines(name, low, high, color="black")
        axes.set_title(f"{title}, tokens/s", fontsize=10)
        axes.tick_params(labelsize=8)
    figure.suptitle(results["system"]["chip"], fontsize=10)
    figure.savefig(path, dpi=150)
