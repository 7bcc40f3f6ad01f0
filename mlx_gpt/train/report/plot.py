"""The plot of a run's loss."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_gpt.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 0.02  # of the running mean, as a share of the run
CLOSE = 0.06  # distance of two lines, as a share of the height, below which their labels would overlap
Rows = Sequence[Mapping[str, Any]]


def prepare_fonts() -> threading.Thread:
    """Import matplotlib in a thread: on a new machine its import lists all fonts, which takes seconds on macOS."""
    thread = threading.Thread(target=import_module, args=["matplotlib.font_manager"], name="fonts", daemon=True)
    thread.start()
    return thread


def plot_loss(rows: Rows, baselines: Mapping[str, float], path: Path, title: str) -> None:
    """Plot the losses over the tokens seen, with a line for each baseline (name -> nats per token), as a PNG file.

    The training loss of single batches is drawn faintly, and its running mean over it.
    """
    from matplotlib.figure import Figure  # instead of pyplot, which has global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens, loss = _points(rows, "loss")
    axes.plot(tokens, loss, color="0.85", linewidth=0.6)
    axes.plot(tokens, running_mean(loss), color="0.35", linewidth=1.2, label="training (running mean)")
    tokens, val_loss = _points(rows, "val_loss")
    axes.plot(tokens, val_loss, color="tab:blue", linewidth=1.8, marker="o", markersize=4, label="validation")
    values = np.concatenate([loss, val_loss, list(baselines.values())])
    if values.size:
        low, high = values.min(), values.max()
        axes.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.08 * (high - low) + 1e-9)
    _draw_baselines(axes, baselines)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.93), framealpha=1, edgecolor="none")
    with atomic_path(path) as hidden:
        figure.savefig(hidden, dpi=150)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of ``WINDOW`` of all values, shortened at the ends."""
    reach = int(WINDOW * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    i = np.arange(len(values))
    first, last = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _points(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x, y


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Draw lines with labels at the right: below the line if the next line above is close, or if it is the lowest."""
    bottom, top = axes.get_ylim()
    ordered = sorted(baselines.items(), key=lambda item: item[1], reverse=True)
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
