"""The right column: one head, opened into queries, keys, values, scores, mask, pattern, z and result."""

from __future__ import annotations

from math import isclose

import numpy as np

from mlx_gpt.lens.diagram.columns import Column, arrow
from mlx_gpt.lens.diagram.measure import cut
from mlx_gpt.lens.diagram.svg import Element, element, label, number, rect, shape_text, text_width, tooltip
from mlx_gpt.model.attention import AttentionHead

SMALL, LARGE, CELL = 100, 200, 19  # widest drawing of scores and mask, of the pattern, and its largest cell


def draw_head(column: Column) -> None:
    """Draw the opened head."""
    anatomy, l = column.anatomy, column.anatomy.layer
    attn = anatomy.model.h[l].attn
    names, count = f"blocks.{l}.*", f"1 of {attn.n_head} head{'s' * (attn.n_head > 1)}"
    column.open_part(
        f"blocks.{l}.attn.head.{anatomy.head}", f"Head {anatomy.head}", AttentionHead.__call__, names, count
    )
    ends = {
        letter: draw_projection(column, letter, text)
        for letter, text in (
            ("q", "queries ask: what a token looks for"),
            ("k", "keys answer: what a token is found by"),
            ("v", "values: what a token has to give"),
        )
    }
    column.y += 8
    scale = f"√{anatomy.sizes['D']}" if isclose(attn.scale, anatomy.sizes["D"] ** -0.5) else f"{1 / attn.scale:.3g}"
    scores = draw_step(column, f"scores = q · k / {scale}", "attn.hook_attn_scores")
    draw_scores_and_mask(column)
    draw_step(column, "the pattern weighs: softmax of scores", "attn.hook_pattern")
    draw_pattern(column)
    z = draw_step(column, "values move: their weighted average", "attn.hook_z")
    result = f", |x| {number(column.measured.heads[anatomy.head])}" if column.measured else ""
    draw_step(column, f"added to the stream{result}", "attn.hook_result")
    left, right = column.x, column.x + column.width
    column.draw(
        arrow([(left, ends["q"]), (left - 10, ends["q"]), (left - 10, scores), (left - 1, scores)], "query"),
        arrow([(left, ends["k"]), (left - 5, ends["k"]), (left - 5, scores), (left - 1, scores)], "key"),
        arrow([(right, ends["v"]), (right + 8, ends["v"]), (right + 8, z), (right + 1, z)], "value"),
    )


def draw_projection(column: Column, letter: str, text: str) -> float:
    """Draw the input and output of the product that makes queries, keys or values; return the middle of its boxes."""
    l, width = column.anatomy.layer, (column.width - 26) / 2
    before, after = (
        column.anatomy.activation(f"blocks.{l}.attn.{name}") for name in (f"{letter}.hook_in", f"hook_{letter}")
    )
    column.draw(label(column.x, column.y + 12, text, "small"))
    column.y += 18
    middle = column.y + 17
    column.draw(
        column.small_box(before, column.x, width),
        arrow([(column.x + width + 2, middle), (column.x + width + 24, middle)], after.hues[0]),
        column.small_box(after, column.x + width + 26, width),
    )
    column.y += 42
    return middle


def draw_step(column: Column, text: str, name: str) -> float:
    """Draw a sentence and the box of the activation that it describes."""
    tensor = column.anatomy.activation(f"blocks.{{l}}.{name}")
    column.draw(label(column.x, column.y + 12, text, "small", column.width))
    column.y += 18
    return column.boxes(tensor)


def draw_scores_and_mask(column: Column) -> None:
    """Draw the scores of the head and the mask, cell by cell; without a text the mask only."""
    n = len(column.measured.labels) if column.measured else min(column.anatomy.sizes["T"], 12)
    cell = SMALL // n
    width, y = n * cell, column.y + 18.0
    x = column.x + column.width - SMALL - 14
    steps = f"M{x} {y:.1f}v{width}h{width}v{-cell}" + f"h{-cell}v{-cell}" * (n - 1) + "z"
    column.draw(
        column.link_tensor(
            column.anatomy.mask,
            rect(x, y, width, width, "frame"),
            element("path", d=steps, class_="tint pattern"),
            label(x, y - 6, f"mask {shape_text(column.anatomy.mask.shape)}", "mono"),
        )
    )
    if column.measured:
        scores = column.measured.scores
        allowed = scores[np.tril_indices(n)]
        column.draw(label(column.x + 14, y - 6, "scores", "mono"))
        shades = (scores - allowed.min()) / (np.ptp(allowed) or 1)
        column.draw(*cells(shades, column.x + 14, y, cell))
    column.y = y + width + 8


def draw_pattern(column: Column) -> None:
    """Draw the pattern of the head with its tokens; nothing without a text."""
    if not column.measured:
        return
    labels, pattern = [cut(text, 8) for text in column.measured.labels], column.measured.pattern
    n, T = len(labels), column.anatomy.sizes["T"]
    cell = min(CELL, LARGE // n)
    style = "mono" if cell >= 12 else "mono tiny"
    x, y = column.x + column.width - n * cell, column.y + 10 + max(text_width(text, style) for text in labels)
    for i, text in enumerate(labels):
        middle = (i + 0.5) * cell + 3.5
        column.draw(label(x - 4, y + middle, text, style + " end"))
        key = label(0, 0, text, style)
        key.set("transform", f"translate({x + middle:.1f} {y - 4:.1f})rotate(-90)")
        column.draw(key)
    column.draw(*cells(pattern, x, y, cell, labels))
    query, found, weight = column.measured.last
    column.y = y + n * cell + 4
    if n < T:
        column.draw(label(x, column.y + 11, f"the first {n} of {T:,} tokens", "small muted"))
        column.y += 15
    text = f"“{query}” looks most at “{found}”: {weight:.2f}"
    column.draw(label(column.x + column.width, column.y + 11, text, "mono muted end", column.width))
    column.y += 22


def cells(shades: np.ndarray, x: float, y: float, cell: int, labels: list[str] | None = None) -> list[Element]:
    """Return the lower triangle of a matrix of numbers in [0, 1] as shaded cells, with labels also as tooltips."""
    n = len(shades)
    nodes = [rect(x, y, n * cell, n * cell, "frame")]
    for i, j in zip(*np.tril_indices(n), strict=True):
        shade = f"{np.nan_to_num(shades[i, j]):.3f}"
        about = [tooltip(f"{labels[i]} looks at {labels[j]}: {shade}")] if labels else []
        nodes.append(rect(x + j * cell, y + i * cell, cell, cell, "fill pattern", *about, fill_opacity=shade))
    return nodes
