"""Parts of the model by short names, and edits that remove them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.hooks import Edit
from mlx_gpt.lens.names import ActivationNames
from mlx_gpt.lens.weights import check_head
from mlx_gpt.model.gpt import GPT

COMPONENT = re.compile(r"L(\d+)(?:H(\d+)|N(\d+)|(MLP|ATTN))", re.IGNORECASE)


def find_component(model: GPT, name: str) -> tuple[str, int | None]:
    """Return the activation that a name means, and an index of its axis 2, or None for all of it.

    L3H1 is head 1 of layer 3: ("blocks.3.attn.hook_z", 1). L3N17 is a neuron, L3MLP and L3ATTN are what the MLP and the
    heads of a layer add. Another name is that of an activation, or a pattern of such. Raises ``UsageError``.
    """
    found = COMPONENT.fullmatch(name)
    if not found and re.match(r"L\d", name, re.IGNORECASE):
        raise UsageError(f"{name!r}: expected a head (L3H1), a neuron (L3N17), L3MLP, L3ATTN or an activation")
    if not found:
        ActivationNames(model.config).find(name)
        return name, None
    layer, head, neuron = (None if number is None else int(number) for number in found.group(1, 2, 3))
    assert layer is not None
    check_head(model, layer, head or 0)
    if head is not None:
        return f"blocks.{layer}.attn.hook_z", head
    if neuron is not None:
        inner = model.h[layer].mlp.c_fc.bias.shape[0]
        if neuron >= inner:
            raise UsageError(f"neuron must be between 0 and {inner - 1}, not {neuron}")
        return f"blocks.{layer}.mlp.hook_post", neuron
    return f"blocks.{layer}.hook_{'mlp' if found[4].upper() == 'MLP' else 'attn'}_out", None


def without(model: GPT, names: Iterable[str]) -> dict[str, Edit]:
    """Return the edits that set components to zero, by their names in ``find_component``.

    Masked attention scores stay masked. Raises ``UsageError`` for an unknown name, and for the scale of a norm.
    """
    removed: dict[str, list[int | None]] = {}
    for name in names:
        activation, index = find_component(model, name)
        for full in ActivationNames(model.config).find(activation).values():
            if full.endswith("hook_scale"):
                raise UsageError(f"{name} cannot be zero: a norm divides by {full}; name what it is computed from")
        removed.setdefault(activation, []).append(index)
    return {activation: zeroed(indices) for activation, indices in removed.items()}


def zeroed(indices: list[int | None]) -> Edit:
    """Return an edit that sets some indices of axis 2 to zero, or the whole activation if None is among them."""

    def edit(x: mx.array, name: str) -> mx.array:
        if None in indices:
            return mx.where(x == -mx.inf, x, 0)
        gone = (mx.arange(x.shape[2])[:, None] == mx.array(indices)).any(axis=1)  # (H,) or (inner,)
        return mx.where(gone.reshape(-1, *[1] * (x.ndim - 3)), 0, x)

    return edit
