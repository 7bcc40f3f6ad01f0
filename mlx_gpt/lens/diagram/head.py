"""The right column: one head, opened into queries, keys, values, scores, mask, pattern, z and result."""

from __future__ import annotations

from math import isclose

import numpy as np

from mlx_gpt.lens.diagram.columns import Column, arrow
from mlx_gpt.lens.diagram.measure import cut
from mlx_gpt.lens.diagram.svg import Element, element, label, number, shape_text, tooltip
from mlx_gpt.model.attention import AttentionHead

SMALL, LARGE, CELL = 100.0, 190.0, 19.0  # width of the drawings of scores and mask, and of the pattern


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
    cell, x, y = SMALL / n, column.x + column.width - SMALL - 14, column.y + 18
    steps = f"M{x:.1f} {y:.1f}v{SMALL}h{SMALL}v{-cell:.2f}" + f"h{-cell:.2f}v{-cell:.2f}" * (n - 1) + "z"
    column.draw(
        column.link_tensor(
            column.anatomy.mask,
            element("rect", x=x, y=y, width=SMALL, height=SMALL, class_="frame"),
            element("path", d=steps, class_="tint pattern"),
            label(x, y - 6, f"mask {shape_text(column.anatomy.mask.shape)}", "mono"),
        )
    )
    if column.measured:
        column.draw(label(column.x + 14, y - 6, "scores", "mono"))
        column.draw(heat_map(column.measured.scores, column.x + 14, y, cell))
    column.y += 18 + SMALL + 8


def heat_map(values: np.ndarray, x: float, y: float, cell: float) -> Element:
    """Return the allowed cells of a head's scores: from the lowest, clear, to the highest."""
    n = len(values)
    allowed = values[np.isfinite(values)]
    low, high = allowed.min(), allowed.max()
    group = element("g", element("rect", x=x, y=y, width=n * cell, height=n * cell, class_="frame"))
    for i in range(n):
        for j in range(i + 1):
            shade = (values[i, j] - low) / ((high - low) or 1)
            if shade >= 0.01:
                group.append(
                    element(
                        "rect",
                        x=x + j * cell,
                        y=y + i * cell,
                        width=cell,
                        height=cell,
                        fill_opacity=f"{shade:.2f}",
                        class_="fill pattern",
                    )
                )
    return group


def draw_pattern(column: Column) -> None:
    """Draw the pattern of the head with its tokens; nothing without a text."""
    if not column.measured:
        return
    labels, pattern = column.measured.labels, column.measured.pattern
    n = len(labels)
    size = min(CELL, LARGE / n)
    x, y = column.x + column.width - n * size, column.y + 58
    style = "mono" if size >= 12 else "mono tiny"
    for i, text in enumerate(labels):
        at = (i + 0.5) * size
        column.draw(label(x - 4, y + at + 3.5, cut(text, 8), style + " end"))
        key = label(0, 0, cut(text, 8), style)
        key.set("transform", f"translate({x + at + 3.5:.1f} {y - 4:.1f})rotate(-90)")
        column.draw(key)
    group = element("g", element("rect", x=x, y=y, width=n * size, height=n * size, class_="frame"))
    for i in range(n):
        for j in range(i + 1):
            weight = float(pattern[i, j])
            about = tooltip(f"{labels[i]} looks at {labels[j]}: {weight:.3f}")
            group.append(
                element(
                    "rect",
                    about,
                    x=x + j * size,
                    y=y + i * size,
                    width=size,
                    height=size,
                    fill_opacity=f"{weight:.3f}",
                    class_="fill pattern",
                )
            )
    column.draw(group)
    column.y = y + n * size + 8
