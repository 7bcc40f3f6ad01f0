"""Perplexity of a long text under a sliding window (transformers, docs/source/en/perplexity.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import log
from pathlib import Path

import numpy as np

from mlx_gpt.check.scoring import OnScored, ScoredText, perplexity_and_error, score
from mlx_gpt.check.task import Evaluation, Task
from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.records import TEXT
from mlx_gpt.text.sources import read_text
from mlx_gpt.text.tokenizer import Tokenizer


def perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    data: Path,
    on_scored: OnScored | None = None,
    stride: int | None = None,
    field: str = TEXT,
) -> Evaluation:
    """Measure the perplexity per token and the bits per byte of a text.

    ``stride``: tokens by which the window moves, by default half the model's context. Bits per byte count the scored
    tokens' bytes only, and none for ``<|endoftext|>``.
    Records are joined by empty lines, as rows are in the recipe; empty ones are left out, but for those of the public
    data set, which the recipe has. Standard errors assume independent tokens, so they are too small for a text.
    Raises ``DataError`` for fewer than two tokens, ``UsageError`` for the stride.
    """
    window = model.config.n_positions
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"--stride must be between 1 and {window}, the model's context, not {stride}")
    is_public = data.parts[-2:] == Path(TASK.file).parts
    text, changes = read_text(data, field, with_empty=is_public)
    if not text:
        raise DataError(f"{data}: expected a text, found an empty file or empty records; give another")
    ids = [*tokenizer.settings.prefix, *tokenizer.encode_documents(text)]
    if len(ids) < 2:
        raise DataError(f"{data}: expected at least 2 tokens, of which the second is scored, found {len(ids)}")
    scored = list(windows(ids, window, stride))
    logprobs = np.concatenate([one.logprobs for one in score(model, scored, on_scored)])
    tokens = chain.from_iterable(one.ids[one.first :] for one in scored)
    n_bytes = sum(len(tokenizer.token_bytes(i)) for i in tokens if i not in tokenizer.end_ids)
    value, error = perplexity_and_error(logprobs)
    scale = len(logprobs) / max(1, n_bytes) / log(2)  # from nats per token
    bits = -float(logprobs.mean()) * scale, None if error is None else error / value * scale
    metrics = {"perplexity": (value, error), "bits_per_byte": bits}
    return Evaluation(metrics, len(logprobs), {"stride": stride}, str(changes))


def windows(ids: list[int], window: int, stride: int) -> Iterator[ScoredText]:
    """Yield windows of ``window`` tokens, ``stride`` apart; each scores the tokens that no earlier one contained.

    The first token of a window has no context and is not scored, as in the recipe: at a stride of a whole window, one
    token of each window is left out.
    """
    scored_to = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end - begin > 1:
            yield ScoredText(ids[begin:end], max(scored_to - begin, 1))
        scored_to = end
        if end == len(ids):
            break


TASK = Task("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", perplexity, ("stride", "field"))
