"""Activation patching: the effect of replacing one activation at a time by its value in another text.

A metric is a function of the logits (B, T, V) that returns an array without axes, such as ``logit_difference``.
Each run begins at the layer that is changed: what is before it is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.gradients import Metric, gradients
from mlx_gpt.lens.hooks import Edit
from mlx_gpt.lens.names import ActivationNames, has_heads, is_attention_map
from mlx_gpt.lens.trace import trace
from mlx_gpt.model.gpt import GPT, as_ids


def activation_patching(
    model: GPT,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    name: str = "hook_resid_pre",
    over: Sequence[str] = ("position",),
    edits: Mapping[str, Edit] | None = None,
) -> mx.array:
    """Return the metric of the corrupted text with one activation at a time taken from the clean one.

    ``name`` is an activation's name within its block, ``over`` what is patched separately besides the layer:
    ("position",) gives (n_layer, T), ("head",) with an ``attn.hook_z`` (n_layer, H), ("head", "position") both.
    Positions of attention maps are those of queries. Texts are ids (B, T) of one length; both are run under ``edits``.
    TransformerLens's ``patching`` module; Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
    """
    clean, corrupted = same_shape(model, clean, corrupted)
    names, axes = block_names(model, name), patched_axes(name, over)
    resid = block_names(model, "hook_resid_pre")
    _, source = trace(model, clean, edits, names)
    _, base = trace(model, corrupted, edits, [*resid, *names])
    rows = []
    for start, layer_name in zip(resid, names, strict=True):
        values = []
        for mask in masks(base[layer_name], axes):
            patched = mx.where(mask, source[layer_name], base[layer_name])
            held = {start: replace(base[start]), layer_name: replace(patched)}
            logits, _ = trace(model, corrupted, {**(edits or {}), **held}, ())
            values.append(metric(logits))
            mx.eval(values[-1])
        rows.append(mx.stack(values).reshape([base[layer_name].shape[axis] for axis in axes]))
    return mx.stack(rows)


def attribution_patching(
    model: GPT,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    name: str = "hook_resid_pre",
    over: Sequence[str] = ("position",),
    edits: Mapping[str, Edit] | None = None,
) -> mx.array:
    """Return a first-order estimate of ``activation_patching`` minus the metric of the corrupted text, in its shape.

    Two runs and one backward pass instead of a run for each entry: the difference of the activations times the gradient
    at the corrupted text (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale").
    """
    clean, corrupted = same_shape(model, clean, corrupted)
    names, axes = block_names(model, name), patched_axes(name, over)
    _, source = trace(model, clean, edits, names)
    _, base = trace(model, corrupted, edits, names)
    _, grads = gradients(model, corrupted, metric, names, edits)
    estimates = []
    for key in names:
        difference = mx.where(source[key] == base[key], 0, source[key] - base[key])  # masked scores are both -inf
        summed = [axis for axis in range(difference.ndim) if axis not in axes]
        estimate = (difference * grads[key]).astype(mx.float32).sum(axis=summed)
        estimates.append(estimate.T if list(axes) != sorted(axes) else estimate)
    return mx.stack(estimates)


def replace(value: mx.array) -> Edit:
    """Return an edit to this value. What leads to the activation is then not computed."""
    return lambda x, name: value


def masks(x: mx.array, axes: Sequence[int]) -> Iterator[mx.array]:
    """Yield a mask for each index of some axes of x, True where it has that index; the last axis first."""
    for index in product(*(range(x.shape[axis]) for axis in axes)):
        mask = mx.array(True)
        for axis, i in zip(axes, index, strict=True):
            shape = [1] * x.ndim
            shape[axis] = x.shape[axis]
            mask = mask & (mx.arange(x.shape[axis]) == i).reshape(shape)
        yield mask


def patched_axes(name: str, over: Sequence[str]) -> list[int]:
    """Return the axes of an activation that "position" and "head" are."""
    over = [over] if isinstance(over, str) else over
    known = {"position": 2, "head": 1} if is_attention_map(name) else {"position": 1}
    if has_heads(name) and not is_attention_map(name):
        known["head"] = 2
    for axis in over:
        if axis not in known:
            raise UsageError(f"{name} is patched over {' and '.join(known)}, not {axis!r}")
    return [known[axis] for axis in over]


def block_names(model: GPT, name: str) -> list[str]:
    """Return an activation's names in all blocks: "attn.hook_z" -> blocks.0.attn.hook_z and so on."""
    found = ActivationNames(model.config).find(f"blocks.*.{name}")
    return list(found.values())


def same_shape(model: GPT, *texts: Any) -> list[mx.array]:
    """Return texts as ids (B, T) of one shape, or raise ``UsageError``."""
    ids = [as_ids(text, model.config.vocab_size) for text in texts]
    if len({text.shape for text in ids}) > 1:
        raise UsageError(
            f"the texts must have equally many tokens, not shapes {' and '.join(str(i.shape) for i in ids)}"
        )
    return ids
