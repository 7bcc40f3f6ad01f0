"""Readings of the residual stream: the logits at every layer, and what each part adds to a logit.

Axis N counts parts. ``activations`` are those of ``trace``; only what a reading needs is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.weights import dense_weight, head_matrix, output_matrices
from mlx_gpt.model.gpt import GPT, checked_ids

Arrays = Mapping[str, mx.array]


def logit_lens(model: GPT, activations: Arrays) -> mx.array:
    """Return the logits that each layer's input and the last layer's output would give: (n_layer + 1, B, T, V).

    The final norm and the head are applied to the unfinished residual stream (nostalgebraist 2020, "interpreting GPT:
    the logit lens"). The last ones are the model's logits.
    """
    return mx.stack([model.logits(model.ln_f(x)) for x in residual_streams(model, activations)])


def logit_lens_top(model: GPT, activations: Arrays, k: int = 5) -> tuple[mx.array, mx.array]:
    """Return the k most probable ids at each layer and their log-probabilities: (n_layer + 1, B, T, k) each, sorted.

    Holds the logits of one layer at a time.
    """
    ids, logprobs = [], []
    for x in residual_streams(model, activations):
        logits = model.logits(model.ln_f(x)).astype(mx.float32)
        top = mx.argpartition(-logits, kth=min(k, logits.shape[-1]) - 1, axis=-1)[..., :k]
        found = mx.take_along_axis(logits, top, axis=-1)
        order = mx.argsort(-found, axis=-1)
        top = mx.take_along_axis(top, order, axis=-1)
        logprob = mx.take_along_axis(found, order, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(top, logprob)
        ids.append(top)
        logprobs.append(logprob)
    return mx.stack(ids), mx.stack(logprobs)


def residual_streams(model: GPT, activations: Arrays) -> list[mx.array]:
    """Return the input of each layer and the output of the last: n_layer + 1 arrays (B, T, C)."""
    last = model.config.n_layer - 1
    inputs = [activations[f"blocks.{layer}.hook_resid_pre"] for layer in range(model.config.n_layer)]
    return [*inputs, activations[f"blocks.{last}.hook_resid_post"]]


def decompose_resid(model: GPT, activations: Arrays, by: str = "layer") -> tuple[mx.array, list[str]]:
    """Return the parts whose sum is the last layer's output, (N, B, T, C), and their N labels.

    ``by="layer"``: embed, pos_embed, then 0_attn_out, 0_mlp_out and so on, TransformerLens's labels. ``by="head"``:
    each attention output as its heads L0H0, L0H1, ... and its bias 0_attn_bias.
    """
    if by not in ("layer", "head"):
        raise UsageError(f"the residual stream is decomposed by layer or head, not {by!r}")
    parts = [("embed", activations["hook_embed"]), ("pos_embed", activations["hook_pos_embed"])]
    for layer in range(model.config.n_layer):
        if by == "layer":
            parts.append((f"{layer}_attn_out", activations[f"blocks.{layer}.hook_attn_out"]))
        else:
            parts += attention_parts(model, activations, layer)
        parts.append((f"{layer}_mlp_out", activations[f"blocks.{layer}.hook_mlp_out"]))
    return mx.stack([part for _, part in parts]), [label for label, _ in parts]


def attention_parts(model: GPT, activations: Arrays, layer: int) -> list[tuple[str, mx.array]]:
    """Return the addition of each head of a layer and of the output bias, (B, T, C) each, with labels."""
    attn, z = model.h[layer].attn, activations[f"blocks.{layer}.attn.hook_z"]  # (B, T, H, D)
    results = mx.einsum("bthd,hdc->hbtc", z, output_matrices(attn))
    heads = [(f"L{layer}H{head}", results[head]) for head in range(len(results))]
    return [*heads, (f"{layer}_attn_bias", mx.broadcast_to(attn.c_proj.bias, results.shape[1:]))]


def logit_direction(model: GPT, token: Any, other: Any = None) -> mx.array:
    """Return the direction in which the head reads a token's logit, minus that of another: (C,).

    For ids (B,) one for each row, (B, C). Raises ``ValueError`` for ids outside the vocabulary.
    """
    weight = head_matrix(model)
    direction = weight[checked_ids(token, model.config.vocab_size)]
    return direction if other is None else direction - weight[checked_ids(other, model.config.vocab_size)]


def logit_attribution(
    model: GPT, activations: Arrays, direction: mx.array, by: str = "layer"
) -> tuple[mx.array, list[str]]:
    """Return what each part adds to a logit or a difference of logits, (N, B, T), and the N labels.

    ``direction`` (C,), or (B, C), is that of ``logit_direction``. The final norm is taken as the linear map that it is
    at the scale of this text, so the values sum to the logit (direct logit attribution; Elhage et al. 2021, "A
    Mathematical Framework for Transformer Circuits"). Labels are those of ``decompose_resid`` and, last, ln_final_bias.
    ``by="neuron"`` splits heads and also each MLP: into L0N0, L0N1, ... and 0_mlp_bias.
    """
    if by not in ("layer", "head", "neuron"):
        raise UsageError(f"logits are attributed by layer, head or neuron, not {by!r}")
    direction = direction.reshape(-1, 1, direction.shape[-1]).astype(mx.float32)  # (1 or B, 1, C)
    weighted = direction * model.ln_f.weight
    weighted = weighted - weighted.mean(axis=-1, keepdims=True)  # the norm removes each part's mean
    scale = activations["ln_final.hook_scale"]  # (B, T, 1)

    def value(part: mx.array) -> mx.array:  # (..., B, T, C) -> (..., B, T)
        return (part * weighted).sum(axis=-1) / scale[..., 0]

    parts, labels = decompose_resid(model, activations, "layer" if by == "layer" else "head")
    values = value(parts)
    if by == "neuron":
        values, labels = split_neurons(model, activations, values, labels, weighted / scale)
    bias = mx.broadcast_to((direction * model.ln_f.bias).sum(axis=-1), values.shape[1:])
    return mx.concatenate([values, bias[None]]), [*labels, "ln_final_bias"]


def split_neurons(
    model: GPT, activations: Arrays, values: mx.array, labels: list[str], direction: mx.array
) -> tuple[mx.array, list[str]]:
    """Replace the value of each MLP by those of its neurons and of its bias; ``direction`` (B, T, C)."""
    rows: list[mx.array] = []
    names: list[str] = []
    for row, label in zip(values, labels, strict=True):
        if not label.endswith("_mlp_out"):
            rows.append(row[None])
            names.append(label)
            continue
        layer = int(label.partition("_")[0])
        mlp, post = model.h[layer].mlp, activations[f"blocks.{layer}.mlp.hook_post"]  # (B, T, inner)
        rows += [
            (post * (direction @ dense_weight(mlp.c_proj))).transpose(2, 0, 1),
            (direction @ mlp.c_proj.bias)[None],
        ]
        names += [*(f"L{layer}N{i}" for i in range(post.shape[-1])), f"{layer}_mlp_bias"]
    return mx.concatenate(rows), names
