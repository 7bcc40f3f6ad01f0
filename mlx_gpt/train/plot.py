"""The plot of a run's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(rows: Sequence[Mapping[str, Any]], marks: Mapping[str, float], path: Path, title: str) -> None:
    """Draw the losses over the tokens seen, with a line for each mark (name -> nats per token), as a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        "loss": {"label": "training", "color": "0.75", "linewidth": 0.8},
        "val_loss": {"label": "validation", "color": "tab:blue", "marker": "o", "markersize": 3.5},
    }
    for name, style in styles.items():
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        axes.plot([tokens for tokens, _ in points], [loss for _, loss in points], **style)
    for name, loss in marks.items():
        axes.axhline(loss, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -10 if loss == min(marks.values()) else 3),  # the curve comes down to the lowest one
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.9))
    figure.savefig(path, dpi=150)
