"""Where each token of a text looks."""

from __future__ import annotations

import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.heads import patterns
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import POSITION, Array, Table, View
from mlx_gpt.lens.weights import check_head


def attention(subject: Subject, layer: int | None = None, head: int | None = None, scores: bool = False) -> View:
    """Show the attention pattern of a head, of all heads of a layer, or of the head that looks back most.

    Without a head, a table before it has the strongest attention of each. ``scores`` adds those before the softmax.
    """
    if head is not None and layer is None:
        raise UsageError("a head is one of a layer; give the layer too")
    check_head(subject.model, layer or 0, head or 0)
    _, activations = subject.trace("blocks.*.attn.hook_pattern")
    every = numbers(patterns(activations)[:, 0])  # (L, H, T, T)
    layers = range(len(every)) if layer is None else [layer]
    tables, heads = [], [(layer or 0, head or 0)]
    if head is None:
        heads = [(l, h) for l in layers for h in range(every.shape[1])]
        overview, order = strongest(subject, every, heads)
        tables.append(overview)
        heads = order[:1] if layer is None else heads
    for l, h in heads:
        tables.append(of_tokens(subject, f"pattern of L{l}H{h}, in percent", every[l, h], "share"))
        if scores:
            tables.append(of_tokens(subject, f"scores of L{l}H{h}", scores_of(subject, l)[h], "amount", "{:.1f}"))
    reading = (
        "Each row is a token that asks, its columns are the tokens it reads from, in percent of its attention; a row "
        "sums to 100, and no token sees the future."
    )
    if head is not None:
        return View("attention", reading, tables)
    means = "Means are those of the queries after the first, which sees only itself."
    return View("attention", reading, tables, [means, "--layer and --head choose another head."])


def of_tokens(subject: Subject, title: str, values: Array, scale: str, number: str = "") -> Table:
    """Return a table of one head, queries x keys; by default in percent. Entries of the future are empty."""
    values = np.where(np.tri(len(values), dtype=bool) & np.isfinite(values), values, np.nan)
    percent = [[f"{100 * x:.0f}" if x >= 0.005 else "" for x in row] for row in values]
    names = subject.positions
    texts = None if number else percent
    return Table(title, names, names, values, (POSITION, POSITION), texts, scale=scale, format=number or "{:.2f}")


def scores_of(subject: Subject, layer: int) -> Array:
    """Return the scaled and masked scores of a layer: (H, T, T)."""
    name = f"blocks.{layer}.attn.hook_attn_scores"
    return numbers(subject.trace(name)[1][name][0])


def strongest(subject: Subject, every: Array, heads: list[tuple[int, int]]) -> tuple[Table, list[tuple[int, int]]]:
    """Return each head's strongest attention to an earlier token but the first, and the heads sorted by it.

    ``every`` (L, H, T, T) are the patterns.
    """
    names, T = subject.positions, every.shape[-1]
    earlier = np.tri(T, k=-1, dtype=bool) & (np.arange(T) > 0)
    found = []
    for l, h in heads:
        pattern = every[l, h]
        query, key = np.unravel_index(np.where(earlier, pattern, -1).argmax(), (T, T))
        weight = pattern[query, key] if earlier.any() else np.nan
        where = pattern[:, 0], np.diagonal(pattern), np.append(0, np.diagonal(pattern, -1))
        values = [weight, *(row[1:].mean() if T > 1 else np.nan for row in where)]
        note = f"{names[query]} reads {names[key]}" if earlier.any() else ""
        found.append((values, note, (l, h)))
    found.sort(key=lambda item: -np.nan_to_num(item[0][0]))
    order = [item[2] for item in found]
    table = Table(
        "each head's strongest weight on a token after the first and before itself, and mean weights",
        [f"L{l}H{h}" for l, h in order],
        ["strongest", "first token", "itself", "token before"],
        np.array([item[0] for item in found]),
        ("head", ""),
        notes=[item[1] for item in found],
        scale="share",
    )
    return table, order
