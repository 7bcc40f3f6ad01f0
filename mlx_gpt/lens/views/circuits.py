"""What a head looks for and what it writes, read from its weights alone."""

from __future__ import annotations

import numpy as np

from mlx_gpt.lens.circuits import FactoredMatrix, composition_scores, ov_circuit, qk_circuit, singular_tokens
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import Array, Table, View

PAIRS, DIRECTIONS, WORDS = 12, 4, 6


def circuits(subject: Subject, layer: int, head: int) -> View:
    """Show the QK and OV circuits of a head: pairs of tokens, singular directions; and its composition with others."""
    model = subject.model
    make = {"QK": qk_circuit, "OV": ov_circuit}
    of_tokens = {kind: f(model, layer, head, tokens=True, fold_norm=True) for kind, f in make.items()}
    inner = {kind: f(model, layer, head, fold_norm=True) for kind, f in make.items()}
    tables = [
        pairs(subject, of_tokens["QK"], "QK: a token that asks → the token it looks for", "score"),
        pairs(subject, of_tokens["OV"], "OV: a token that is read → the token whose logit rises", "adds"),
        directions(subject, inner["QK"], "QK: strongest directions, what asks → what is found"),
        directions(subject, inner["OV"], "OV: strongest directions, what is read → what is written"),
        *composition(subject, layer, head),
    ]
    reading = (
        f"L{layer}H{head} in terms of tokens, from its weights and the embeddings alone: which pairs of tokens attend, "
        "what is written when a token is read, and how much it reads what earlier heads write, and later ones what it "
        "writes (composition by queries, keys, values; 0 to 1)."
    )
    return View(f"circuits of L{layer}H{head}", reading, tables)


def pairs(subject: Subject, circuit: FactoredMatrix, title: str, what: str) -> Table:
    """Return a table of the highest entries of a circuit over tokens."""
    rows, columns, values = circuit.top_pairs(PAIRS)
    labels = subject.labels(np.array(rows)), subject.labels(np.array(columns))
    return ranked(title, what, numbers(values), [f"{a} → {b}" for a, b in zip(*labels, strict=True)])


def directions(subject: Subject, circuit: FactoredMatrix, title: str) -> Table:
    """Return a table of the first singular directions."""
    read, written, values = singular_tokens(subject.model, circuit, DIRECTIONS, WORDS)
    labels = ([" ".join(subject.labels(row)) for row in np.array(ids)] for ids in (read, written))
    return ranked(title, "size", numbers(values), [f"{a} → {b}" for a, b in zip(*labels, strict=True)])


def ranked(title: str, what: str, values: Array, notes: list[str]) -> Table:
    """Return a table of values, the highest first, each with a text."""
    return Table(title, [str(i + 1) for i in range(len(notes))], [what], values[:, None], notes=notes)


def composition(subject: Subject, layer: int, head: int) -> list[Table]:
    """Return tables of the heads that this one reads and of those that read it, by Q, K and V."""
    scores = np.stack([np.array(composition_scores(subject.model, kind)) for kind in "QKV"], axis=-1)
    earlier, later = scores[:layer, :, layer, head], scores[layer, head, layer + 1 :]  # (layers, H, 3)
    columns = ["queries", "keys", "values"]
    found = []
    for title, values, first in (("reads from", earlier, 0), ("is read by", later, layer + 1)):
        names = [f"L{l + first}H{h}" for l, h in np.ndindex(values.shape[:2])]
        values = values.reshape(len(names), 3)
        if names:
            order = np.argsort(-values.max(axis=1), kind="stable")
            found.append(
                Table(
                    f"L{layer}H{head} {title}",
                    [names[i] for i in order][:PAIRS],
                    columns,
                    values[order][:PAIRS],
                    ("head", "input"),
                )
            )
    return found
