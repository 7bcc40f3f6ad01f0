"""Perplexity of a long text by a window that slides over it (transformers, docs/source/en/perplexity.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import log

import numpy as np

from mlx_gpt.check.scoring import Progress, Scored, perplexity_and_error, score
from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

Figures = dict[str, tuple[float, float | None]]  # name: value, standard error


def perplexity(
    model: GPT, tokenizer: Tokenizer, text: str, stride: int, progress: Progress | None = None
) -> tuple[Figures, int]:
    """Perplexity per token and bits per byte of a text, and how many tokens were scored.

    Bits are of the scored tokens, and so are the bytes. Standard errors take tokens for independent draws, which a
    text's are not: they are too small. Raises ``DataError`` for less than two tokens, ``UsageError`` for the stride.
    """
    window = model.config.n_positions
    if not 1 <= stride <= window:
        raise UsageError(f"--stride must be between 1 and {window}, the model's context, not {stride}")
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError(f"the text: expected at least 2 tokens, of which the second is scored, found {len(ids)}")
    scored = list(windows(ids, window, stride))
    log_probs = np.concatenate([one.log_probs for one in score(model, scored, progress)])
    tokens = chain.from_iterable(one.ids[one.first :] for one in scored)
    n_bytes = sum(len(tokenizer.token_bytes(i)) for i in tokens)
    value, error = perplexity_and_error(log_probs)
    scale = len(log_probs) / n_bytes / log(2)  # from nats per token
    bits = -float(log_probs.mean()) * scale, None if error is None else error / value * scale
    return {"perplexity": (value, error), "bits_per_byte": bits}, len(log_probs)


def windows(ids: list[int], window: int, stride: int) -> Iterator[Scored]:
    """Windows of ``window`` tokens, each ``stride`` further; scored is what no earlier one held, and has one before it.

    So at a stride of a whole window, the first token of each is not scored, as in the recipe.
    """
    scored_to = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end - begin > 1:
            yield Scored(ids[begin:end], max(scored_to - begin, 1))
        scored_to = end
        if end == len(ids):
            break
