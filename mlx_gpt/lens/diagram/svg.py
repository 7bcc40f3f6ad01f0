"""Elements of an SVG, its style, and how numbers and shapes are written in it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any
from xml.etree import ElementTree

from mlx_gpt.lens.diagram.parts import Function

Element = ElementTree.Element
MONO = 0.61  # width of a character of a monospaced font, in em
SANS = 0.54  # of another font, about
SIZES = {"title": 20, "small": 11, "mono": 11, "tiny": 9.5}  # of fonts, in pixels; others have 12

LIGHT = {"bg": "#ffffff", "surface": "#f5f6f8", "fg": "#1d2430", "muted": "#5f6878", "line": "#d3d8e0"}
LIGHT |= {"stream": "#2f6fde", "query": "#c2571a", "key": "#1b7f5c", "value": "#7a4cc2", "mlp": "#8f6d14"}
DARK = {"bg": "#14171d", "surface": "#1b1f27", "fg": "#e8eaf0", "muted": "#9aa3b2", "line": "#3a414d"}
DARK |= {"stream": "#6ea2ff", "query": "#f0965a", "key": "#55c69a", "value": "#b590f2", "mlp": "#dcb95c"}


def colors(palette: dict[str, str]) -> str:
    """Return the definitions of the colors; a page that defines ``--fg`` and the others gives its own."""
    return "".join(f"--d-{name}:var(--{name},{value});" for name, value in palette.items())


STYLE = f"""
.diagram{{{colors(LIGHT)}}}
@media (prefers-color-scheme:dark){{.diagram{{{colors(DARK)}}}}}
.diagram text{{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--d-fg)}}
.diagram .d-mono{{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}}
.diagram .d-small{{font-size:11px}}
.diagram .d-tiny{{font-size:9.5px}}
.diagram .d-muted{{fill:var(--d-muted)}}
.diagram .d-bold{{font-weight:600}}
.diagram .d-title{{font-size:20px;font-weight:650}}
.diagram .d-end{{text-anchor:end}}
.diagram .d-middle{{text-anchor:middle}}
.diagram .d-page{{fill:var(--d-bg)}}
.diagram .d-panel{{fill:var(--d-surface)}}
.diagram .d-zoom{{fill:var(--d-line);fill-opacity:.35}}
.diagram .d-stream{{--h:var(--d-stream)}}
.diagram .d-query{{--h:var(--d-query)}}
.diagram .d-key{{--h:var(--d-key)}}
.diagram .d-value{{--h:var(--d-value)}}
.diagram .d-mlp{{--h:var(--d-mlp)}}
.diagram .d-norm{{--h:var(--d-muted)}}
.diagram .d-pattern{{--h:var(--d-fg)}}
.diagram .d-fill{{fill:var(--h)}}
.diagram .d-tint{{fill:var(--h);fill-opacity:.17}}
.diagram .d-outline{{fill:var(--d-bg);stroke:var(--h);stroke-opacity:.75}}
.diagram .d-stroke{{fill:none;stroke:var(--h);stroke-width:1.3}}
.diagram .d-wide{{stroke-width:5;stroke-linecap:round}}
.diagram .d-area{{fill:var(--h);fill-opacity:.55;stroke:var(--d-bg);stroke-width:.5}}
.diagram .d-frame{{fill:none;stroke:var(--d-line);pointer-events:all}}
.diagram a:hover .d-outline,.diagram a:hover .d-tint{{stroke:var(--h);stroke-width:2;stroke-opacity:1}}
""".strip()


def element(tag: str, *children: Element | str | None, **attributes: Any) -> Element:
    """Return an element; ``data_part`` becomes ``data-part``, None is left out.

    Each class in ``class_`` gets the prefix ``d-``, so that no rule of a page with the diagram in it applies.
    """
    if classes := attributes.pop("class_", None):
        attributes["class"] = " ".join(f"d-{name}" for name in classes.split())
    named = {name.replace("_", "-"): value for name, value in attributes.items() if value is not None}
    node = ElementTree.Element(tag, {name: written(value) for name, value in named.items()})
    for child in children:
        if isinstance(child, str):
            node.text = printable(child)
        elif child is not None:
            node.append(child)
    return node


def written(value: Any) -> str:
    """Write an attribute, a number to a tenth, and 0 for one that is not finite, as those of a broken model."""
    if not isinstance(value, float):
        return printable(str(value))
    return f"{value:.1f}".removesuffix(".0") if isfinite(value) else "0"


def printable(text: str) -> str:
    """Escape control and bidirectional characters, and those that XML does not allow, as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tooltip(*lines: str) -> Element:
    node = element("title")
    node.text = "\n".join(map(printable, lines))
    return node


def rect(x: float, y: float, width: float, height: float, class_: str, *children: Element, **more: Any) -> Element:
    return element("rect", *children, x=x, y=y, width=width, height=height, class_=class_, **more)


def label(x: float, y: float, text: str, class_: str = "", width: float | None = None) -> Element:
    """Return a text with its baseline at y, squeezed if it would be wider than ``width``."""
    is_wide = width is not None and text_width(text, class_) > width
    fit = {"textLength": width, "lengthAdjust": "spacingAndGlyphs"} if is_wide else {}
    return element("text", text, x=x, y=y, class_=class_ or None, **fit)


def text_width(text: str, class_: str) -> float:
    """Estimate the width of a text in pixels."""
    classes = class_.split()
    size = next((SIZES[name] for name in ("title", "tiny", "small", "mono") if name in classes), 12)
    return len(text) * size * (MONO if "mono" in classes else SANS)


def link(function: Function, *children: Element, title: Sequence[str], code: str, **attributes: Any) -> Element:
    """Return a link to a function in the code, with its name in the last line of the tooltip."""
    line = function.__code__.co_firstlineno
    href = f"{code}/{function.__module__.replace('.', '/')}.py#L{line}"
    about = tooltip(*title, f"{function.__module__}.{function.__qualname__}")
    return element("a", about, *children, href=href, **attributes)


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def number(value: float) -> str:
    """Write a measured number to three digits: 0.0120, 1.23, 123, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
