"""What the residual stream says at each layer, and what each part of the model adds to a logit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.attribution import logit_attribution, logit_direction, logit_lens_top, residual_streams
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import POSITION, Array, Table, View
from mlx_gpt.lens.weights import dense_weight, head_matrix

STREAM = ("hook_embed", "hook_pos_embed", "ln_final.hook_scale", "blocks.*.hook_mlp_out")


def logit_lens(subject: Subject) -> View:
    """Show the token that each layer would predict next at each position, its probability, and the last one's rank."""
    model = subject.model
    _, activations = subject.trace("blocks.*.hook_resid_pre", "blocks.*.hook_resid_post")
    ids, logprobs = logit_lens_top(model, activations, 1)  # (L + 1, 1, T, 1)
    rows = [f"before L{layer}" for layer in range(model.config.n_layer)] + ["output"]
    texts = [subject.labels(row) for row in np.array(ids[:, 0, :, 0])]
    ranks = []
    for x in residual_streams(model, activations):
        logits = model.logits(model.ln_f(x))
        ranks.append((logits > mx.take_along_axis(logits, ids[-1], axis=-1)).sum(axis=-1) + 1)  # (1, T)
        mx.eval(ranks[-1])
    probabilities = np.exp(numbers(logprobs[:, 0, :, 0]))
    names, axes = subject.positions, ("layer", POSITION)
    tables = [
        Table("most probable next token", rows, names, probabilities, axes, texts, scale="share"),
        Table("rank of the output's token", rows, names, ranks_of(ranks), axes, scale="rank", format="{:.0f}"),
    ]
    reading = (
        "Each column is a token of the text, each row the next token that the residual stream already predicts there, "
        "if the final norm and the head read it at that layer; the darker, the more probable."
    )
    return View("logit lens", reading, tables)


def ranks_of(ranks: list[mx.array]) -> Array:
    """(1, T) for each layer -> (L + 1, T)."""
    return np.array(mx.concatenate(ranks)).astype(np.float64)


def attribution(subject: Subject, answer: str | None = None, wrong: str | None = None) -> View:
    """Show what each part adds to the difference of two logits at the end of the text."""
    model, (right, other) = subject.model, subject.pair(answer, wrong)
    L, H = model.config.n_layer, model.config.n_head
    logits, activations = subject.trace(*STREAM, "blocks.*.attn.hook_z")
    values, labels = logit_attribution(model, activations, logit_direction(model, right, other), "head")
    added = dict(zip(labels, numbers(values[:, 0, -1]).tolist(), strict=True))
    total = float(numbers(logits[0, -1, right] - logits[0, -1, other]))
    columns = {"bias": "{}_attn_bias", "MLP": "{}_mlp_out"}
    columns = {f"H{h}": f"L{{}}H{h}" for h in range(H)} | columns
    grid = np.array([[added.pop(name.format(l)) for name in columns.values()] for l in range(L)])
    grid = np.concatenate([grid, grid.sum(axis=1, keepdims=True)], axis=1)
    rest = {"token": added.pop("embed"), "position": added.pop("pos_embed"), **added, "all layers": grid[:, -1].sum()}
    if subject.edits:
        rest["removed"] = total - sum(rest.values())
    rest["sum"] = summed = sum(rest.values())
    pair = " − ".join(subject.labels([right, other]))
    title, axes = "heads, attention's output bias and MLP of each layer", ("layer", "part")
    number = "{:+.2f}"
    tables = [
        Table(title, [f"L{l}" for l in range(L)], [*columns, "sum"], grid, axes, format=number),
        Table("the rest", list(rest), ["adds"], np.array([*rest.values()])[:, None], ("part", ""), format=number),
    ]
    reading = (
        f"Each part adds so much to the difference of two logits after the last token, {pair}, in logits; "
        f"above zero it speaks for {subject.labels([right])[0]}. The final norm is taken at this text's scale."
    )
    remark = f"The parts sum to {summed:+.4f}; the logits differ by {total:+.4f}."
    return View(f"attribution of {pair}", reading, tables, [remark])


def neurons(subject: Subject, answer: str | None = None, wrong: str | None = None, top: int = 16) -> View:
    """Show the neurons that add most to the difference of two logits at the end, up or down, and what they write."""
    if top < 1:
        raise UsageError(f"at least 1 neuron is shown, not {top}")
    model, (right, other) = subject.model, subject.pair(answer, wrong)
    _, activations = subject.trace(*STREAM, "blocks.*.attn.hook_z", "blocks.*.mlp.hook_post")
    values, labels = logit_attribution(model, activations, logit_direction(model, right, other), "neuron")
    added = {label: x for label, x in zip(labels, numbers(values[:, 0, -1]).tolist(), strict=True) if "N" in label}
    first = sorted(added, key=lambda label: -abs(added[label]))[:top]
    rows, notes = [], []
    for label in first:
        layer, neuron = map(int, label[1:].split("N"))
        post = float(numbers(activations[f"blocks.{layer}.mlp.hook_post"][0, -1, neuron]))
        rows.append([added[label], post])
        direction = dense_weight(model.h[layer].mlp.c_proj)[:, neuron] * model.ln_f.weight  # (C,)
        raised = head_matrix(model) @ (direction if post >= 0 else -direction)
        notes.append(" ".join(subject.labels(np.array(mx.argsort(-raised)[:6]))))
    pair = " − ".join(subject.labels([right, other]))
    share = sum(abs(added[label]) for label in first) / (sum(map(abs, added.values())) or 1)
    reading = (
        f"The neurons that add most to the difference of two logits after the last token, {pair}: what each adds, its "
        "activation there, and the tokens whose logits it raises most with that sign."
    )
    table = Table(
        "neurons",
        first,
        ["adds", "activation"],
        np.array(rows),
        ("neuron", ""),
        notes=notes,
        by_column=True,
        format="{:+.3f}",
    )
    remark = f"{len(first)} of {len(added):,} neurons, with {share:.0%} of all that neurons add, up or down."
    return View(f"neurons for {pair}", reading, [table], [remark])
