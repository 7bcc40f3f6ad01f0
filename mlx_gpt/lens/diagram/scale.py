"""Where the parameters, the FLOPs and the activations of a model are: areas to scale."""

from __future__ import annotations

from collections.abc import Callable

from mlx_gpt.lens.diagram.columns import short
from mlx_gpt.lens.diagram.parts import Anatomy, Tensor
from mlx_gpt.lens.diagram.svg import Element, element, label, text_width, tooltip

HEIGHT = 96.0  # of a band
Rectangle = tuple[float, float, float, float]  # x, y, width, height
Group = tuple[str, list[tuple[Tensor, int]]]  # a component and its tensors with their sizes


def draw_scale(anatomy: Anatomy, x: float, y: float, width: float) -> tuple[Element, float]:
    """Draw three bands in which equal areas are equal numbers of parameters, FLOPs and activations; return the end."""
    root = element("g", data_part="scale")
    bands: list[tuple[str, list[Group]]] = [
        ("parameters", sized(parameter_groups(anatomy), lambda tensor: tensor.size)),
        ("FLOPs", sized(activation_groups(anatomy), lambda tensor: tensor.flops)),
        ("numbers in activations", sized(activation_groups(anatomy), lambda tensor: tensor.size)),
    ]
    for what, groups in bands:
        whole = sum(size for _, tensors in groups for _, size in tensors)
        root.append(label(x, y + 12, f"{whole:,} {what}, areas to scale", "bold"))
        root.append(draw_band(what, groups, whole, x, y + 20, width))
        y += HEIGHT + 54
    return root, y


def parameter_groups(anatomy: Anatomy) -> dict[str, list[Tensor]]:
    """Return the parameters of the model by component, in the order of computation."""
    groups = {path: anatomy.parameters(path) for path in ("wte", "wpe")}
    groups |= {f"h.{layer}": anatomy.block_parameters(layer) for layer in range(anatomy.model.config.n_layer)}
    return groups | {path: anatomy.parameters(path) for path in ("ln_f", "lm_head")}


def activation_groups(anatomy: Anatomy) -> dict[str, list[Tensor]]:
    """Return the activations that a trace stores by default, and the logits, by component."""
    groups: dict[str, list[Tensor]] = {}
    for name in anatomy.activations:
        if name in anatomy.by_default or name == "hook_unembed":
            first, *rest = name.split(".")
            group = f"L{rest[0]}" if first == "blocks" else first
            groups.setdefault(group, []).append(anatomy.activation(name))
    return groups


def sized(groups: dict[str, list[Tensor]], size: Callable[[Tensor], int]) -> list[Group]:
    """Return the tensors with their sizes, without those of size zero and groups without any."""
    found = [(name, [(tensor, size(tensor)) for tensor in tensors if size(tensor)]) for name, tensors in groups.items()]
    return [(name, tensors) for name, tensors in found if tensors]


def draw_band(what: str, groups: list[Group], whole: int, x: float, y: float, width: float) -> Element:
    """Draw a column for each component, as wide as its share, and in it a layer for each tensor."""
    band = element("g")
    same: dict[tuple[str, int], tuple[Tensor, list[Rectangle]]] = {}  # boxes of equal name and size
    for name, tensors in groups:
        size = sum(size for _, size in tensors)
        share, top = width * size / whole, y
        for tensor, part in tensors:
            height = HEIGHT * part / size
            same.setdefault((short(tensor.name), part), (tensor, []))[1].append((x, top, share, height))
            top += height
        if share > text_width(name, "mono") + 4:
            band.append(label(x + share / 2, y + HEIGHT + 14, name, "mono muted middle"))
        x += share
    for (name, part), (tensor, rectangles) in same.items():
        each = f" in each of {len(rectangles)} blocks" if len(rectangles) > 1 else ""
        text = f"{name}: {part:,} {what}{each}, {part * len(rectangles) / whole:.2%}"
        paths = [
            element("path", d=path, class_=f"area {hue}")
            for hue, path in zip(tensor.hues, split(rectangles, len(tensor.hues)), strict=True)
        ]
        band.insert(0, element("g", tooltip(text), *paths))
        left, top, share, height = rectangles[0]
        if height >= 12 and share * len(rectangles) > text_width(name, "mono tiny") + 10:
            band.append(label(left + 5, top + min(height / 2, 12) + 3, name, "mono tiny"))
    return band


def split(rectangles: list[Rectangle], n: int) -> list[str]:
    """Return paths of n equal layers of the rectangles."""
    return [
        "".join(f"M{x:.2f} {y + i * h / n:.2f}h{w:.2f}v{h / n:.2f}h{-w:.2f}z" for x, y, w, h in rectangles)
        for i in range(n)
    ]
