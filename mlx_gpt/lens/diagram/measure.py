"""Numbers of a text for the diagram: norms at its last token, one head's pattern, the next token."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.lens.diagram.parts import Anatomy
from mlx_gpt.lens.views.subject import numbers, token_label
from mlx_gpt.text.tokenizer import Tokenizer

SHOWN = 20  # tokens of a pattern that are drawn
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
ADDED = ("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Measured:
    """``norms`` are lengths of vectors (C,) at the last token; ``heads`` of what each head of the opened layer adds.

    ``scores`` and ``pattern`` (N, N) are those of the opened head between the first N tokens, ``labels``; ``last``
    is the last token, the token that it attends to most, and the weight.
    """

    labels: list[str]
    norms: dict[str, float]
    heads: list[float]
    scores: np.ndarray
    pattern: np.ndarray
    last: tuple[str, str, float]
    next_tokens: list[tuple[str, float]]


def measure(anatomy: Anatomy, tokenizer: Tokenizer) -> Measured:
    """Compute the numbers of a text from its trace."""
    activations, prefix = anatomy.activations, f"blocks.{anatomy.layer}.attn"
    names = [name for name in activations if name.endswith(STREAM + ADDED)]
    norms = mx.stack([norm(activations[name]) for name in names])
    last = numbers(activations[f"{prefix}.hook_pattern"][0, anatomy.head, -1])
    probabilities = numbers(mx.softmax(anatomy.logits[0, -1].astype(mx.float32)))
    labels = [token_label(tokenizer, int(i)) for i in np.array(anatomy.tokens[0])]
    scores, pattern = (
        numbers(activations[f"{prefix}.{name}"][0, anatomy.head, :SHOWN, :SHOWN])
        for name in ("hook_attn_scores", "hook_pattern")
    )
    return Measured(
        labels[:SHOWN],
        dict(zip(names, numbers(norms).tolist(), strict=True)),
        numbers(norm(activations[f"{prefix}.hook_result"])).tolist(),
        scores,
        pattern,
        (labels[-1], labels[last.argmax()], float(last.max())),
        [(token_label(tokenizer, int(i)), float(probabilities[i])) for i in np.argsort(-probabilities)[:5]],
    )


def norm(x: mx.array) -> mx.array:
    """Return the lengths of the vectors of the last token: (1, T, ..., C) -> (...)."""
    return mx.sqrt(mx.square(x[0, -1].astype(mx.float32)).sum(axis=-1))


def cut(text: str, n: int) -> str:
    """Return the first n characters of a text, the last of them … if it is longer."""
    return text if len(text) <= n else text[: n - 1] + "…"
