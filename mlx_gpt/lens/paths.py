"""Path patching: the effect of one component on another alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.gradients import Metric
from mlx_gpt.lens.hooks import Edit
from mlx_gpt.lens.names import ActivationNames, has_heads
from mlx_gpt.lens.patching import block_names, patched_axes, replace, same_shape
from mlx_gpt.lens.trace import trace
from mlx_gpt.lens.weights import check_head
from mlx_gpt.model.gpt import GPT


def path_patching(
    model: GPT,
    tokens: Any,
    source: Any,
    sender: tuple[str, int | None],
    receiver: tuple[str, int | None],
    metric: Metric,
    through_mlps: bool = False,
    edits: Mapping[str, Edit] | None = None,
) -> mx.array:
    """Return the metric of a text, ids (B, T), if one component reads another as it is in the text ``source``.

    Sender and receiver are a name and a head or None: ("blocks.0.attn.hook_z", 3), ("blocks.0.hook_mlp_out", None) and
    ("hook_embed", None) can send, ("blocks.5.attn.hook_q", 1), with k and v, ("blocks.3.mlp.hook_pre", None) and
    ("hook_unembed", None) receive. The other heads and MLPs are frozen at the text, so that only the path along the
    residual stream changes; with ``through_mlps`` MLPs between the two are computed (Wang et al. 2022,
    "Interpretability in the Wild", appendix B; Goldowsky-Dill et al. 2023). All runs are under ``edits``.
    """
    tokens, source = same_shape(model, tokens, source)
    frozen = ["hook_embed", "hook_pos_embed", *block_names(model, "attn.hook_z")]
    frozen += [] if through_mlps else block_names(model, "hook_mlp_out")
    for name, head in (sender, receiver):
        if (head is not None) != has_heads(name):
            raise UsageError(f"{name} has {'heads; give' if has_heads(name) else 'no heads; give None, not'} a head")
    (sending,), (receiving,) = (ActivationNames(model.config).find(name).values() for name, _ in (sender, receiver))
    _, base = trace(model, tokens, edits, [*frozen, sending, receiving])
    _, other = trace(model, source, edits, sending)
    held: dict[str, Edit] = {**(edits or {}), **{name: replace(base[name]) for name in frozen}}
    held[sending] = replace(of_head(model, sending, sender[1], other[sending], base[sending]))
    _, reached = trace(model, tokens, held, receiving)
    patched = of_head(model, receiving, receiver[1], reached[receiving], base[receiving])
    return metric(trace(model, tokens, {**(edits or {}), receiving: replace(patched)}, ())[0])


def of_head(model: GPT, name: str, head: int | None, new: mx.array, old: mx.array) -> mx.array:
    """Return ``new`` for one head and ``old`` for the others, (B, T, H, ...) each; ``new`` if head is None."""
    if head is None:
        return new
    check_head(model, int(name.split(".")[1]), head)
    (axis,) = patched_axes(name, ["head"])
    index = [1] * old.ndim
    index[axis] = old.shape[axis]
    return mx.where((mx.arange(old.shape[axis]) == head).reshape(index), new, old)
