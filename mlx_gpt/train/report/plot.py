"""The plot of a run's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 0.02  # share of the run that the smoothed curve averages over
CLOSE = 0.06  # share of the plot's height: marks nearer than this share no side of a line with their labels
Rows = Sequence[Mapping[str, Any]]


def plot_loss(rows: Rows, marks: Mapping[str, float], path: Path, title: str) -> None:
    """Draw the losses over the tokens seen, with a line for each mark (name -> nats per token), as a PNG file.

    The training loss is that of single batches, so it is drawn faintly, and its running mean over it.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens, loss = _points(rows, "loss")
    axes.plot(tokens, loss, color="0.85", linewidth=0.6)
    axes.plot(tokens, smoothed(loss), color="0.35", linewidth=1.2, label="training (running mean)")
    tokens, val_loss = _points(rows, "val_loss")
    axes.plot(tokens, val_loss, color="tab:blue", linewidth=1.8, marker="o", markersize=4, label="validation")
    everything = np.concatenate([loss, val_loss, list(marks.values())])
    if everything.size:
        low, high = everything.min(), everything.max()
        axes.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.08 * (high - low) + 1e-9)
    _draw_marks(axes, marks)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.93), framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=150)


def smoothed(values: np.ndarray, share: float = SMOOTH) -> np.ndarray:
    """The mean around each value, over ``share`` of all of them; at the ends over those that there are."""
    reach = int(share * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    i = np.arange(len(values))
    first, last = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _points(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x, y


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    """Lines across, labelled at the right end: above the line, but below it where the next one is close, or the curve
    comes down to it."""
    bottom, top = axes.get_ylim()
    ordered = sorted(marks.items(), key=lambda mark: mark[1], reverse=True)
    for i, (name, loss) in enumerate(ordered):
        crowded = i > 0 and ordered[i - 1][1] - loss < CLOSE * (top - bottom)
        lowest = i == len(ordered) - 1 and i > 0
        axes.axhline(loss, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -10 if crowded or lowest else 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
