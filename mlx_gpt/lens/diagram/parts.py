"""What is in a model: its parameters and activations as boxes, with shapes, counts and FLOPs.

Shapes are read from the parameters and from a trace. Without a text the trace is of a full context and stays
uncomputed: MLX knows the shapes before any value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gpt.lens.hooks import Activations
from mlx_gpt.lens.names import ActivationNames
from mlx_gpt.lens.trace import layer_norm, trace
from mlx_gpt.model.attention import (
    AttentionHead,
    MultiHeadAttention,
    attention_pattern,
    attention_scores,
    causal_mask,
    weighted_values,
)
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT, as_ids
from mlx_gpt.model.mlp import MLP
from mlx_gpt.model.ops import LayerNorm

Function = Callable[..., Any]


class Kind(NamedTuple):
    """The axes of an activation, the function that computes it, its color, and the product that it is, if it is one."""

    axes: str
    function: Function
    hue: str
    product: str = ""  # as for einsum


# By the end of the name. Axis letters are those of ``mlx_gpt.model``, and M for the width inside the MLP.
KINDS = {
    "hook_embed": Kind("BTC", GPT.embed, "stream"),
    "hook_pos_embed": Kind("BTC", GPT.embed, "stream"),
    "hook_resid_pre": Kind("BTC", Block.__call__, "stream"),
    "hook_scale": Kind("BT1", layer_norm, "norm"),
    "hook_normalized": Kind("BTC", layer_norm, "norm"),
    "hook_out": Kind("BTC", layer_norm, "norm"),
    "q.hook_in": Kind("BTC", AttentionHead.__call__, "query"),
    "k.hook_in": Kind("BTC", AttentionHead.__call__, "key"),
    "v.hook_in": Kind("BTC", AttentionHead.__call__, "value"),
    "hook_q": Kind("BTHD", AttentionHead.__call__, "query", "BTC,HCD->BTHD"),
    "hook_k": Kind("BTHD", AttentionHead.__call__, "key", "BTC,HCD->BTHD"),
    "hook_v": Kind("BTHD", AttentionHead.__call__, "value", "BTC,HCD->BTHD"),
    "hook_attn_scores": Kind("BHTS", attention_scores, "pattern", "BTHD,BSHD->BHTS"),
    "hook_pattern": Kind("BHTS", attention_pattern, "pattern"),
    "hook_z": Kind("BTHD", weighted_values, "value", "BHTS,BSHD->BTHD"),
    "hook_result": Kind("BTHC", AttentionHead.__call__, "value"),
    "hook_attn_out": Kind("BTC", MultiHeadAttention.__call__, "value", "BTHD,HDC->BTC"),
    "hook_resid_mid": Kind("BTC", Block.__call__, "stream"),
    "hook_pre": Kind("BTM", MLP.__call__, "mlp", "BTC,CM->BTM"),
    "hook_post": Kind("BTM", MLP.__call__, "mlp"),
    "hook_mlp_out": Kind("BTC", MLP.__call__, "mlp", "BTM,MC->BTC"),
    "hook_resid_post": Kind("BTC", Block.__call__, "stream"),
    "hook_unembed": Kind("BTV", GPT.logits, "stream", "BTC,CV->BTV"),
    "tokens": Kind("BT", as_ids, "stream"),
    "mask": Kind("TS", causal_mask, "pattern"),
}

# By a part of the hub's name.
PARAMETERS: tuple[tuple[str, Function, tuple[str, ...]], ...] = (
    ("wte.", GPT.embed, ("stream",)),
    ("wpe.", GPT.embed, ("stream",)),
    ("ln_", LayerNorm.__call__, ("norm",)),
    ("attn.c_attn.", MultiHeadAttention.__call__, ("query", "key", "value")),
    ("attn.c_proj.", MultiHeadAttention.__call__, ("value",)),
    ("mlp.", MLP.__call__, ("mlp",)),
    ("lm_head.", GPT.logits, ("stream",)),
)


@dataclass(frozen=True)
class Tensor:
    """A box: a parameter under the hub's name, or an activation under TransformerLens's."""

    name: str
    array: mx.array
    function: Function  # where the code computes it, or computes with it
    hues: tuple[str, ...]
    is_parameter: bool
    axes: str = ""
    product: str = ""
    flops: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)


class Anatomy:
    """The boxes of a model, with one block and one of its heads opened.

    ``tokens`` are ids (1, T); ``activations`` and ``logits`` are those of their trace, not yet computed.
    """

    def __init__(self, model: GPT, tokens: Any, layer: int, head: int):
        names = ActivationNames(model.config)
        self.by_default = set(names.stored)
        opened = [name for name in names.by_name if name.startswith((f"blocks.{layer}.", "ln_final.", "hook_unembed"))]
        self.model, self.layer, self.head = model, layer, head
        self.tokens = as_ids(tokens, model.config.vocab_size)
        self.logits, self.activations = trace(model, tokens, names=[*names.stored, *opened])
        self._parameters = dict(tree_flatten(model.parameters()))
        self.sizes = axis_sizes(self.activations)
        self.mask = activation("mask", causal_mask(self.sizes["T"], self.sizes["S"]))
        self.ids = activation("tokens", self.tokens)

    def activation(self, name: str) -> Tensor:
        """Return the box of an activation; ``{l}`` in its name stands for the opened layer."""
        name = name.format(l=self.layer)
        return activation(name, self.activations[name], self.sizes)

    def parameters(self, path: str) -> list[Tensor]:
        """Return the boxes of the parameters below a module's path, such as ``h.0.attn``; none if there is no such."""
        found = [(name, array) for name, array in self._parameters.items() if name.startswith(f"{path}.")]
        return [Tensor(name, array, *parameter_kind(name), is_parameter=True) for name, array in found]

    def block_parameters(self, layer: int) -> list[Tensor]:
        """Return the parameters of a block, in the order of its computation."""
        return [tensor for part in ("ln_1", "attn", "ln_2", "mlp") for tensor in self.parameters(f"h.{layer}.{part}")]

    def flops_of(self, *prefixes: str) -> int:
        """Return the FLOPs, for the whole text, of the activations whose names begin with one of these."""
        return sum(self.activation(name).flops for name in self.activations if name.startswith(prefixes))

    @property
    def is_quantized(self) -> bool:
        return any(name.endswith(".scales") for name in self._parameters)

    @property
    def flops(self) -> int:
        """FLOPs of the model for the whole text. Blocks have equal shapes, so each has as many as the opened one."""
        return self.flops_of(f"blocks.{self.layer}.") * self.model.config.n_layer + self.flops_of("hook_unembed")


def activation(name: str, array: mx.array, sizes: dict[str, int] | None = None) -> Tensor:
    """Return the box of an activation. A product of matrices takes 2 FLOPs for each multiply-add."""
    kind = kind_of(name)
    letters = set(kind.product) - set(",->")
    flops = 2 * prod((sizes or {})[letter] for letter in letters) if letters else 0
    return Tensor(name, array, kind.function, (kind.hue,), False, kind.axes, kind.product, flops)


def kind_of(name: str) -> Kind:
    """Return the kind of an activation by the end of its name."""
    parts = name.split(".")
    return KINDS.get(".".join(parts[-2:])) or KINDS[parts[-1]]


def axis_sizes(activations: Activations) -> dict[str, int]:
    """Return the sizes of the axes by their letters, from the traced arrays."""
    sizes: dict[str, int] = {}
    for name, array in activations.items():
        for letter, size in zip(kind_of(name).axes, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{name} has {size} along {letter}, other activations have {sizes[letter]}")
    return sizes


def parameter_kind(name: str) -> tuple[Function, tuple[str, ...]]:
    """Return the function that computes with a parameter, and its colors."""
    for part, function, hues in PARAMETERS:
        if f".{part}" in f".{name}":
            return function, hues
    raise ValueError(f"no box is known for the parameter {name}")


def total(tensors: Iterable[Tensor]) -> int:
    """Return the number of parameters in boxes."""
    return sum(tensor.size for tensor in tensors)
