"""The architecture of a model as an SVG, drawn from its parameters and a trace.

``parts`` finds what is in the model, ``measure`` its numbers for a text; ``whole``, ``block`` and ``head`` draw
the three columns, each a part of the one to its left, and ``scale`` the areas below them.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.diagram.block import draw_block
from mlx_gpt.lens.diagram.columns import Column
from mlx_gpt.lens.diagram.head import draw_head
from mlx_gpt.lens.diagram.measure import Measured, cut, measure
from mlx_gpt.lens.diagram.parts import Anatomy
from mlx_gpt.lens.diagram.scale import draw_scale
from mlx_gpt.lens.diagram.svg import STYLE, Element, element, label, rect, text_width
from mlx_gpt.lens.diagram.whole import draw_model
from mlx_gpt.lens.weights import check_head
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.units import format_large

WIDTH, MARGIN, TOP = 952, 20, 96
MODEL, BLOCK, HEAD = (16, 280), (314, 320), (656, 276)  # left edges and widths
HUES = {"fill stream": "stream", "fill query": "query", "fill key": "key", "fill value": "value", "fill mlp": "MLP"}


def draw_diagram(
    model: GPT,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
    *,
    name: str = "",
    to_scale: bool = False,
    layer: int = 0,
    head: int = 0,
    fold: bool = True,
    code: str = "..",
) -> str:
    """Return the architecture of a model, with one layer and one of its heads opened, as the text of an SVG.

    Each parameter and activation is a box with its name and shape that links to its function below ``code``, a folder
    or address that holds ``mlx_gpt``. With a text, boxes show norms at its last token and the head's pattern; without
    one, shapes and FLOPs are those of a full context, and no activation is computed. ``to_scale`` adds areas in
    proportion to parameters, FLOPs and activations; ``fold`` lets blocks with equal numbers share a row.

    A group of a component has its name as ``data-part``; colors are CSS variables that a page can define (``STYLE``).
    Raises ``UsageError`` for a layer or head that the model does not have, and for a text that is empty, longer than
    the context or without a tokenizer, and ``ValueError`` for ids that are not the model's.
    """
    check_head(model, layer, head)
    ids: Any = mx.zeros((1, model.config.n_positions), mx.int32)
    measured = None
    if text is not None:
        if tokenizer is None:
            raise UsageError("a text needs the model's tokenizer; give both or neither")
        found = tokenizer.encode_prompt(text)
        ids = [found] if found else mx.zeros((1, 0), mx.int32)
    anatomy = Anatomy(model, ids, layer, head)
    if text is not None and tokenizer is not None:
        measured = measure(anatomy, tokenizer)
    nodes, bottom = draw_columns(anatomy, measured, fold, code)
    if to_scale:
        bands, bottom = draw_scale(anatomy, MARGIN, bottom + 14, WIDTH - 2 * MARGIN)
        nodes.append(bands)
    nodes += [*heading(anatomy, name, text), *legend(anatomy, bottom + 26, measured is not None)]
    return write_svg(nodes, bottom + 84, f"Architecture of {name or 'a GPT-2'}", summary(anatomy))


def write_svg(nodes: list[Element], height: float, title: str, description: str) -> str:
    """Return the text of an SVG with these elements on a page."""
    style = element("style")
    style.text = STYLE
    root = element(
        "svg",
        element("title", title, id="diagram-title"),
        element("desc", description, id="diagram-desc"),
        style,
        rect(0, 0, WIDTH, height, "page", rx=10),
        *nodes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_labelledby="diagram-title diagram-desc",
    )
    root.set("class", "diagram")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def draw_columns(anatomy: Anatomy, measured: Measured | None, fold: bool, code: str) -> tuple[list[Element], float]:
    """Draw the model, its opened block and head beside each other, and return the elements and their lower end."""

    def column(place: tuple[int, int], left: int, right: int, top: int) -> Column:
        return Column(anatomy, measured, code, place[0] + left, place[1] - left - right, TOP + top)

    model, block, head = column(MODEL, 28, 0, 0), column(BLOCK, 36, 10, 10), column(HEAD, 16, 16, 10)
    row, strip = draw_model(model, fold), draw_block(block)
    draw_head(head)
    bottom = max(model.y, block.y, head.y) + 6
    zooms = [
        *zoom(sum(MODEL), row, BLOCK, block.y + 6),
        *zoom(block.x + block.width, strip, HEAD, head.y + 6),
    ]
    return [*zooms, model.root, block.root, head.root], bottom


def zoom(left: float, ends: tuple[float, float], place: tuple[int, int], bottom: float) -> list[Element]:
    """Return the panel of a column, and the area between it and the box that it opens."""
    x, width = place
    path = f"M{left:.1f} {ends[0]:.1f}L{x:.1f} {TOP + 8:.1f}V{bottom - 8:.1f}L{left:.1f} {ends[1]:.1f}z"
    panel = rect(x, TOP, width, bottom - TOP, "panel", rx=8)
    return [panel, element("path", d=path, class_="zoom")]


def heading(anatomy: Anatomy, name: str, text: str | None) -> list[Element]:
    """Return the name of the model, its size and what is measured."""
    T = anatomy.sizes["T"]
    shown = f"a full context of {T:,} tokens" if text is None else f"“{cut(text, 110)}”, {T:,} token{'s' * (T > 1)}"
    width = WIDTH - 2 * MARGIN
    return [
        label(MARGIN, 36, cut(name, 70) or "GPT-2", "title", width),
        label(MARGIN, 58, summary(anatomy), "", width),
        label(MARGIN, 76, f"{shown}: {format_large(anatomy.flops, 'FLOP')}", "muted", width),
    ]


def summary(anatomy: Anatomy) -> str:
    """Return one sentence: number of blocks and heads, parameters, FLOPs."""
    config, per_token = anatomy.model.config, anatomy.flops / anatomy.tokens.size
    return (
        f"GPT-2 with {config.n_layer} block{'s' * (config.n_layer > 1)} of {config.n_head} "
        f"head{'s' * (config.n_head > 1)}, width {config.n_embd:,}: "
        f"{anatomy.model.n_parameters:,} parameters, {format_large(per_token, 'FLOP')} per token"
    )


def legend(anatomy: Anatomy, y: float, has_text: bool) -> list[Element]:
    """Return what boxes, colors, letters and numbers mean."""
    counts = ", quantized: stored numbers" if anatomy.is_quantized else ""
    norms = "; |x|: length of the last token's vector" if has_text else ""
    axes = ", ".join(f"{letter} {anatomy.sizes[letter]:,}" for letter in "BTSCHDMV")
    lines = [
        [("tint norm", f"parameter: the hub's name, shape (out×in), count{counts}"), *HUES.items()],
        [("outline norm", f"activation: TransformerLens's name, shape{norms}")],
        [("", f"FLOPs: 2 for each multiply-add of a matrix product, masked scores included; axes: {axes}")],
    ]
    nodes = []
    for i, line in enumerate(lines):
        x = float(MARGIN)
        for class_, text in line:
            if class_:
                nodes.append(rect(x, y + 18 * i - 9, 16, 11, class_, rx=2))
                x += 21
            nodes.append(label(x, y + 18 * i, text, "small muted"))
            x = max(x + text_width(text, "small") + 12, BLOCK[0] + BLOCK[1] / 2 if x < BLOCK[0] else 0)
    return nodes
