"""Columns of boxes from the top down, with the residual stream beside them."""

from __future__ import annotations

from mlx_gpt.lens.diagram.measure import Measured
from mlx_gpt.lens.diagram.parts import Anatomy, Function, Tensor
from mlx_gpt.lens.diagram.svg import Element, element, label, link, number, rect, shape_text, text_width
from mlx_gpt.train.units import format_large

ROW, BOX = 24, 20  # height of a row, and of the box in it
LAST = 84  # width of the last of the two columns at the right end of a box


class Column:
    """Boxes between ``x`` and ``x + width``: ``y`` is where the next one begins, ``stream`` where the stream runs."""

    def __init__(self, anatomy: Anatomy, measured: Measured | None, code: str, x: float, width: float, y: float):
        self.anatomy, self.measured, self.code = anatomy, measured, code
        self.x, self.width, self.y = x, width, y
        self.stream = x - 20
        self.root = self.part = element("g")

    def open_part(self, name: str, title: str, function: Function, note: str = "", right: str = "") -> None:
        """Begin the group of a component with a heading; what is drawn next goes into it."""
        self.part = element("g", data_part=name)
        self.root.append(self.part)
        self.y += 8
        heading = label(self.x, self.y + 13, title, "bold")
        self.draw(link(function, heading, title=[title], code=self.code))
        if right:
            self.draw(label(self.x + self.width, self.y + 13, right, "small muted end"))
        if note:
            self.draw(label(self.x, self.y + 27, note, "mono muted", self.width))
        self.y += 34 if note else 20

    def close_part(self) -> None:
        """End the group of a component: what is drawn next belongs to none."""
        self.part = self.root
        self.y += 6

    def draw(self, *nodes: Element) -> None:
        self.part.extend(nodes)

    def boxes(self, *tensors: Tensor) -> float:
        """Draw tensors below each other, and return the middle of the last one."""
        for tensor in tensors:
            self.draw(self.box(tensor))
            self.y += ROW
        return self.y - ROW + BOX / 2

    def activations(self, *names: str) -> float:
        """Draw activations, ``{l}`` in whose names stands for the opened layer."""
        return self.boxes(*map(self.anatomy.activation, names))

    def box(self, tensor: Tensor) -> Element:
        """Return one tensor in a row: name, shape and count of a parameter; name, norm and shape of an activation."""
        name, shape = short(tensor.name), shape_text(tensor.shape)
        middle, last = (shape, f"{tensor.size:,}") if tensor.is_parameter else (self.norm(tensor.name), shape)
        end, y = self.x + self.width, self.y + 14
        taken = LAST + text_width(middle, "mono") if middle else 8 + text_width(last, "mono")
        texts = [label(self.x + 8, y, name, "mono", self.width - taken - 14)]
        if middle:
            texts.append(label(end - LAST, y, middle, "mono muted end" if tensor.is_parameter else "mono end"))
        texts.append(label(end - 8, y, last, "mono muted end", LAST - 16 if middle else None))
        return self.link_tensor(tensor, *frame(tensor, self.x, self.y, self.width, BOX), *texts)

    def small_box(self, tensor: Tensor, x: float, width: float) -> Element:
        """Return one tensor with its shape below its name."""
        texts = [
            label(x + 7, self.y + 14, short(tensor.name), "mono", width - 14),
            label(x + 7, self.y + 28, shape_text(tensor.shape), "mono muted", width - 14),
        ]
        return self.link_tensor(tensor, *frame(tensor, x, self.y, width, 34), *texts)

    def link_tensor(self, tensor: Tensor, *children: Element) -> Element:
        kind = "data_parameter" if tensor.is_parameter else "data_activation"
        data = {kind: tensor.name, "data_shape": ",".join(map(str, tensor.shape))}
        return link(tensor.function, *children, title=describe(tensor), code=self.code, **data)

    def norm(self, name: str) -> str:
        """Return the norm of an activation at the last token, if it was measured."""
        return f"|x| {number(self.measured.norms[name])}" if self.measured and name in self.measured.norms else ""

    def flops(self, *prefixes: str) -> str:
        """Write the FLOPs per token of the activations whose names begin with one of these."""
        anatomy = self.anatomy
        return f"{format_large(anatomy.flops_of(*prefixes) / anatomy.tokens.size, 'FLOP')} per token"

    def note(self, text: str, right: str = "") -> None:
        """Write a line in small letters."""
        self.draw(label(self.x, self.y + 9, text, "small muted"))
        if right:
            self.draw(label(self.x + self.width, self.y + 9, right, "small muted end"))
        self.y += 16

    def reads(self, y: float) -> float:
        """Draw an arrow from the stream to the boxes at this height."""
        self.draw(arrow([(self.stream, y), (self.x - 2, y)], "stream"), circle(self.stream, y, 3.5, "fill"))
        return y

    def adds(self, y: float, hue: str) -> float:
        """Draw an arrow from a box to a plus on the stream at this height."""
        cross = f"M{self.stream - 4:.1f} {y:.1f}h8M{self.stream:.1f} {y - 4:.1f}v8"
        self.draw(arrow([(self.x, y), (self.stream + 9, y)], hue), circle(self.stream, y, 8, "outline"))
        self.draw(element("path", d=cross, class_="stroke stream"))
        return y

    def draw_stream(self, start: float, end: float, *ties: float) -> None:
        """Draw the stream below everything else, tied to the boxes at some heights."""
        lines = "".join(f"M{self.stream:.1f} {y:.1f}H{self.x:.1f}" for y in ties)
        stream = element("path", d=f"M{self.stream:.1f} {start:.1f}V{end:.1f}", class_="stroke wide stream")
        self.root[:0] = [stream, element("path", d=lines, class_="stroke stream")] if ties else [stream]


def frame(tensor: Tensor, x: float, y: float, width: float, height: float) -> list[Element]:
    """Return the outline of a box: tinted for a parameter, in equal parts where it belongs to several functions."""
    style, share = "tint" if tensor.is_parameter else "outline", width / len(tensor.hues)
    radius = 3 if len(tensor.hues) == 1 else 0
    return [rect(x + i * share, y, share, height, f"{style} {hue}", rx=radius) for i, hue in enumerate(tensor.hues)]


def describe(tensor: Tensor) -> list[str]:
    """Return the lines of a tensor's tooltip: full name, shape, axes and type; count of parameters or FLOPs."""
    axes = f" ({', '.join(tensor.axes)})" if tensor.axes else ""
    lines = [f"{shape_line(tensor)}{axes}, {str(tensor.array.dtype).removeprefix('mlx.core.')}"]
    if tensor.is_parameter:
        lines.append(f"{tensor.size:,} parameters")
    if tensor.product:
        lines.append(f"{tensor.product}: {tensor.flops:,} FLOPs")
    return lines


def shape_line(tensor: Tensor) -> str:
    return f"{tensor.name} {shape_text(tensor.shape)}"


def short(name: str) -> str:
    """Return a name without the prefix of its block, which stands above it: ``h.3.attn.c_attn.bias``."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[2] if first in ("h", "blocks") else name


def arrow(points: list[tuple[float, float]], hue: str) -> Element:
    """Return a line with a head at its end."""
    (x1, y1), (x2, y2) = points[-2:]
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    side = [(x2 - 5 * dx - 3.5 * dy * s, y2 - 5 * dy - 3.5 * dx * s) for s in (1, -1)]
    return element("path", d=line(points) + line([side[0], (x2, y2), side[1]]), class_=f"stroke {hue}")


def line(points: list[tuple[float, float]]) -> str:
    """Return the path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def circle(x: float, y: float, r: float, style: str) -> Element:
    return element("circle", cx=x, cy=y, r=r, class_=f"{style} stream")
