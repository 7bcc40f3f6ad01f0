"""Measure what is published about the inside of a model: a logit difference, losses without a head, heads of a kind.

Texts begin with the start token (``<|endoftext|>``), as in TransformerLens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.lens import head_scores, logit_difference, trace
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss

N_TEXTS, LENGTH = 10, 50  # of random tokens, as in ARENA and TransformerLens's Main_Demo


def answer_differences(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    """Return the logit of the right answer minus that of the wrong one, averaged over ``entry["prompts"]``."""
    found = []
    for prompt, *answers in entry["prompts"]:
        right, wrong = (tokenizer.encode(answer, is_start=False)[0] for answer in answers)
        logits, _ = trace(model, [[tokenizer.start_id, *tokenizer.encode(prompt)]], names=())
        found.append(logit_difference(right, wrong)(logits).item())
    return [float(np.mean(found))]


def losses_without_values(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    """Return the loss of a text; with a head's values zero; with the part of them zero that depends on the token.

    The third is what zero values are after TransformerLens's default processing, which folds the bias of the norm and
    of the values, the same for each token, into the output bias.
    """
    ids = mx.array([[tokenizer.start_id, *tokenizer.encode(entry["prompt"])]])
    block, head = f"blocks.{entry['layer']}", entry["head"]
    name = f"{block}.attn.hook_v"

    def zero(x: mx.array, name: str) -> mx.array:
        return mx.zeros_like(x)

    def loss(value: mx.array | None = None) -> float:
        """The loss with ``value`` as the head's values."""

        def replace(v: mx.array, name: str) -> mx.array:
            return v if value is None else mx.where((mx.arange(v.shape[2]) == head)[:, None], value, v)

        logits, _ = trace(model, ids[:, :-1], {name: replace}, ())
        return np.array(mean_loss(logits, ids[:, 1:])).item()

    _, of_zero = trace(model, ids[:, :-1], {f"{block}.ln1.hook_normalized": zero}, name)
    return [loss(), loss(mx.array(0.0)), loss(of_zero[name])]


def heads_of_a_kind(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> str:
    """Return the heads of the highest scores, "layer.head", as many as are published; ``entry["score"]``: the kind."""
    scores = head_scores(model, LENGTH, N_TEXTS, start=tokenizer.start_id)[entry["score"]]
    n = len(entry["values"].split())
    best = np.sort(np.argsort(-np.array(scores).ravel())[:n])
    return " ".join(f"{i // model.config.n_head}.{i % model.config.n_head}" for i in best)
