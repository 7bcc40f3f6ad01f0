"""What kind of head each head is, and what the loss becomes without it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gpt.lens.ablation import ablate_heads
from mlx_gpt.lens.generation import generate
from mlx_gpt.lens.heads import KINDS, attention_entropy, first_token_mass, head_scores, repeated_tokens
from mlx_gpt.lens.trace import trace
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import Array, Table, View

LENGTH, BATCH = 25, 4  # of the random tokens, which are repeated once


def heads(subject: Subject, ablate: str = "zero") -> View:
    """Show scores of each head on repeated random tokens, its entropy and mass on the first token, and its ablation.

    Entropy, mass and loss are those of the text, or without one of some of the random tokens.
    """
    model, n = subject.model, subject.model.config.n_positions
    length = min(LENGTH, n // 2)
    scores = head_scores(model, length, BATCH, edits=subject.edits)
    if len(subject.ids):
        tokens, what = subject.tokens, f"the text, {len(subject.ids)} tokens"
        reference = None if ablate == "zero" else own_texts(subject)
        if ablate == "resample":
            tokens = mx.repeat(tokens, BATCH, axis=0)
    else:
        rows = 2 if ablate == "resample" else 1
        tokens = repeated_tokens(model.config.vocab_size, length, rows)
        what = f"{tokens.size} of the random tokens"
        reference = None
    _, activations = trace(model, tokens, subject.edits, "blocks.*.attn.hook_pattern")
    measured = [scores[kind] for kind in KINDS]
    measured += [reading(activations)[..., 1:].mean(axis=(1, 3)) for reading in (attention_entropy, first_token_mass)]
    measured.append(ablate_heads(model, tokens, ablate, reference, edits=subject.edits))
    values = np.stack([numbers(array) for array in measured], axis=-1)  # (L, H, 6)
    names = [f"L{l}H{h}" for l, h in np.ndindex(values.shape[:2])]
    values = values.reshape(len(names), -1)
    order = np.argsort(-values[:, : len(KINDS)].max(axis=1), kind="stable")
    columns = [*KINDS, "entropy", "first token", "loss without"]
    reading = (
        f"Scores are mean weights on {BATCH} x {length} random tokens that are repeated once: of the token before, of "
        "the same token before, and of the one after that (induction). Entropy in nats, the weight on the first token, "
        f"and how much the loss rises without the head ({ablate} ablation), in nats per token, are those of {what}. "
        "Entropy and weight are means of the queries after the first, which sees only itself."
    )
    remarks = [f"Highest: {best([*KINDS, columns[-1]], names, values[:, [0, 1, 2, -1]])}."]
    remarks.append(missing(values[:, : len(KINDS)].max(axis=0), length))
    table = Table(
        "heads", [names[i] for i in order], columns, values[order], ("head", ""), by_column=True, format="{:.3f}"
    )
    return View("heads", reading, [table], remarks)


def best(columns: list[str], names: list[str], values: Array) -> str:
    """Return the head with the highest value in each column."""
    found = (int(i) for i in np.nan_to_num(values, nan=-np.inf).argmax(axis=0))
    return ", ".join(
        f"{column} {names[i]} ({values[i, c]:.3f})" for c, (column, i) in enumerate(zip(columns, found, strict=True))
    )


def missing(highest: Array, length: int) -> str:
    """Say what evenly spread attention would score, and of which kinds no head scores twice as much."""
    weights = 1 / np.arange(2, 2 * length + 1)  # of each query after the first
    even = np.array([weights.mean(), *[weights[length - 1 :].mean()] * 2])  # of KINDS
    scores = ", ".join(f"{kind} {x:.3f}" for kind, x in zip(KINDS, even, strict=True))
    absent = [f"no {kind} head" for kind, score, x in zip(KINDS, highest, even, strict=True) if score < 2 * x]
    found = f"; near that, there is {', '.join(absent)}" if absent else ""
    return f"Evenly spread attention scores {scores}{found}."


def own_texts(subject: Subject) -> mx.array:
    """Return texts of the subject's length that the model generates, (BATCH, T), as a reference for ablation."""
    start = mx.full((BATCH, 1), subject.tokenizer.start_id, mx.int32)
    if len(subject.ids) == 1:
        return start
    new = generate(subject.model, start, len(subject.ids) - 1, temperature=1.0, seed=0)
    return mx.concatenate([start, new], axis=1)
