"""Readings that change activations and run the rest of the model: patching and ablation.

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
from mlx_gpt.lens.weights import check_head
from mlx_gpt.model.gpt import GPT, as_ids
from mlx_gpt.train.loss import mean_loss

Arrays = Mapping[str, mx.array]


def activation_patching(
    model: GPT,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    name: str = "hook_resid_pre",
    over: Sequence[str] = ("position",),
) -> mx.array:
    """Return the metric of the corrupted text with one activation at a time taken from the clean one.

    ``name`` is an activation's name within its block, ``over`` what is patched separately besides the layer:
    ("position",) gives (n_layer, T), ("head",) with an ``attn.hook_z`` (n_layer, H), ("head", "position") both.
    Positions of attention maps are those of queries. Texts are ids (B, T) of one length. TransformerLens's
    ``patching`` module; Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
    """
    clean, corrupted = same_shape(model, clean, corrupted)
    names, axes = block_names(model, name), patched_axes(name, over)
    resid = block_names(model, "hook_resid_pre")
    _, source = trace(model, clean, names=names)
    _, base = trace(model, corrupted, names=[*resid, *names])
    rows = []
    for start, layer_name in zip(resid, names, strict=True):
        values = []
        for mask in masks(base[layer_name], axes):
            patched = mx.where(mask, source[layer_name], base[layer_name])
            logits, _ = trace(model, corrupted, {start: replace(base[start]), layer_name: replace(patched)}, ())
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
) -> mx.array:
    """Return a first-order estimate of ``activation_patching`` minus the metric of the corrupted text, in its shape.

    Two runs and one backward pass instead of a run for each entry: the difference of the activations times the gradient
    at the corrupted text (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale").
    """
    clean, corrupted = same_shape(model, clean, corrupted)
    names, axes = block_names(model, name), patched_axes(name, over)
    _, source = trace(model, clean, names=names)
    _, base = trace(model, corrupted, names=names)
    _, grads = gradients(model, corrupted, metric, names)
    estimates = []
    for key in names:
        difference = mx.where(source[key] == base[key], 0, source[key] - base[key])  # masked scores are both -inf
        summed = [axis for axis in range(difference.ndim) if axis not in axes]
        estimate = (difference * grads[key]).astype(mx.float32).sum(axis=summed)
        estimates.append(estimate.T if list(axes) != sorted(axes) else estimate)
    return mx.stack(estimates)


def path_patching(
    model: GPT,
    tokens: Any,
    source: Any,
    sender: tuple[str, int | None],
    receiver: tuple[str, int | None],
    metric: Metric,
    through_mlps: bool = False,
) -> mx.array:
    """Return the metric of a text, ids (B, T), if one component reads another as it is in the text ``source``.

    Sender and receiver are a name and a head or None: ("blocks.0.attn.hook_z", 3), ("blocks.0.hook_mlp_out", None) and
    ("hook_embed", None) can send, ("blocks.5.attn.hook_q", 1), with k and v, ("blocks.3.mlp.hook_pre", None) and
    ("hook_unembed", None) receive. The other heads and MLPs are frozen at the text, so that only the path along the
    residual stream changes; with ``through_mlps`` MLPs between the two are computed (Wang et al. 2022,
    "Interpretability in the Wild", appendix B; Goldowsky-Dill et al. 2023).
    """
    tokens, source = same_shape(model, tokens, source)
    frozen = ["hook_embed", "hook_pos_embed", *block_names(model, "attn.hook_z")]
    frozen += [] if through_mlps else block_names(model, "hook_mlp_out")
    for name, head in (sender, receiver):
        if (head is not None) != has_heads(name):
            raise UsageError(f"{name} has {'heads; give' if has_heads(name) else 'no heads; give None, not'} a head")
    (sending,), (receiving,) = (ActivationNames(model.config).find(name).values() for name, _ in (sender, receiver))
    _, base = trace(model, tokens, names=[*frozen, sending, receiving])
    _, other = trace(model, source, names=sending)
    held: dict[str, Edit] = {name: replace(base[name]) for name in frozen}
    held[sending] = replace(of_head(model, sending, sender[1], other[sending], base[sending]))
    _, reached = trace(model, tokens, held, receiving)
    patched = of_head(model, receiving, receiver[1], reached[receiving], base[receiving])
    return metric(trace(model, tokens, {receiving: replace(patched)}, ())[0])


def ablate_heads(model: GPT, tokens: Any, mode: str = "zero", reference: Any = None, seed: int = 0) -> mx.array:
    """Return how much the loss of a text, ids (B, T), rises without each head: (n_layer, H), in nats per token.

    The head's z is replaced. ``zero``: by 0. ``mean``: by its mean over a reference text, all rows and positions.
    ``resample``: by that of another row of the reference, drawn with ``seed``; the reference then has the text's shape,
    and at least two rows. The default reference is the text itself.
    """
    ids = as_ids(tokens, model.config.vocab_size)
    if ids.shape[1] < 2:
        raise UsageError("a loss needs a text of at least 2 tokens")
    resid, zs = block_names(model, "hook_resid_pre"), block_names(model, "attn.hook_z")
    logits, base = trace(model, ids, names=[*resid, *zs])
    other = base if reference is None else trace(model, reference, names=zs)[1]
    loss = mean_loss(logits[:, :-1], ids[:, 1:])
    rows = []
    for start, name in zip(resid, zs, strict=True):
        instead = replacement(other[name], base[name], mode, seed)
        for mask in masks(base[name], (2,)):
            edits = {start: replace(base[start]), name: replace(mx.where(mask, instead, base[name]))}
            ablated, _ = trace(model, ids, edits, ())
            rows.append(mean_loss(ablated[:, :-1], ids[:, 1:]) - loss)
            mx.eval(rows[-1])
    return mx.stack(rows).reshape(model.config.n_layer, model.config.n_head)


def replacement(z: mx.array, base: mx.array, mode: str, seed: int) -> mx.array:
    """Return what replaces z (B, T, H, D) in an ablation, in a shape that broadcasts to that of ``base``."""
    if mode == "zero":
        return mx.zeros_like(base)
    if mode == "mean":
        return z.mean(axis=(0, 1), keepdims=True)
    if mode != "resample":
        raise UsageError(f"a head is ablated by zero, mean or resample, not {mode!r}")
    B = z.shape[0]
    if z.shape != base.shape or B < 2:
        raise UsageError("resampling takes another row of a reference of the text's shape, with at least two rows")
    shift = mx.random.randint(1, B, (), key=mx.random.key(seed))  # no row is its own replacement
    return z[(mx.arange(B) + shift) % B]


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


def of_head(model: GPT, name: str, head: int | None, new: mx.array, old: mx.array) -> mx.array:
    """Return ``new`` for one head and ``old`` for the others, (B, T, H, ...) each; ``new`` if head is None."""
    if head is None:
        return new
    check_head(model, int(name.split(".")[1]), head)
    (axis,) = patched_axes(name, ["head"])
    index = [1] * old.ndim
    index[axis] = old.shape[axis]
    return mx.where((mx.arange(old.shape[axis]) == head).reshape(index), new, old)


def same_shape(model: GPT, *texts: Any) -> list[mx.array]:
    """Return texts as ids (B, T) of one shape, or raise ``UsageError``."""
    ids = [as_ids(text, model.config.vocab_size) for text in texts]
    if len({text.shape for text in ids}) > 1:
        raise UsageError(
            f"the texts must have equally many tokens, not shapes {' and '.join(str(i.shape) for i in ids)}"
        )
    return ids
