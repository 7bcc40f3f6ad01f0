"""Compute the logprobs of the tokens of texts: the basis of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT, checked_ids
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import next_token_losses

BATCH_TOKENS = 4096
HEAD_ROWS = 256  # positions whose logits are in memory at once
LENGTH_STEP = 32  # lengths are rounded up to a multiple, so that few shapes are compiled

OnScored = Callable[[int, int], None]  # called with the number of texts scored, and of all


@dataclass(frozen=True)
class ScoredText:
    """Ids, of which ``ids[first:]`` are scored, each given all before it."""

    ids: Sequence[int]
    first: int


@dataclass(frozen=True)
class Score:
    """Of each scored token: its logprob in nats (n,), and whether it was the most probable one (n,)."""

    logprobs: np.ndarray
    is_greedy: np.ndarray


def score(model: GPT, texts: Sequence[ScoredText], on_scored: OnScored | None = None) -> list[Score]:
    """Score texts, in their order. Each needs at least one token before the first scored.

    Texts of similar length share a batch, padded on the right, which a causal model does not see. Only the scored
    positions go through the head.
    """
    hidden = mx.compile(lambda ids: model.hidden(ids))
    score_rows = mx.compile(lambda x, targets: _score_logits(model.logits(x), targets))
    scores: dict[int, Score] = {}
    for rows, T in batches([len(text.ids) - 1 for text in texts], model.config.n_positions):
        B = max(1, BATCH_TOKENS // T)
        ids = np.zeros((B, T), np.int64)
        for row, i in enumerate(rows):
            ids[row, : len(texts[i].ids) - 1] = texts[i].ids[:-1]
        at = np.concatenate([row * T + np.arange(texts[i].first, len(texts[i].ids)) - 1 for row, i in enumerate(rows)])
        targets = np.concatenate([texts[i].ids[texts[i].first :] for i in rows])
        x = hidden(checked_ids(ids, model.config.vocab_size)).reshape(B * T, -1)  # (B*T, C)
        logprobs, is_greedy = _score_positions(score_rows, x, at, checked_ids(targets, model.config.vocab_size))
        ends = np.cumsum([len(texts[i].ids) - texts[i].first for i in rows])[:-1]
        parts = zip(rows, np.split(logprobs, ends), np.split(is_greedy, ends), strict=True)
        scores |= {i: Score(*of_text) for i, *of_text in parts}
        if on_scored:
            on_scored(len(scores), len(texts))
    return [scores[i] for i in range(len(texts))]


def batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of texts to batch, and their padded length T. The longest first, which need most memory."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        T = min(longest, -(-lengths[order[0]] // LENGTH_STEP) * LENGTH_STEP)
        B = max(1, BATCH_TOKENS // T)
        yield order[:B], T
        order = order[B:]


def _score_positions(
    score_rows: Callable[..., tuple[mx.array, mx.array]], x: mx.array, at: np.ndarray, targets: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """Score the targets (n,) that follow the positions ``at`` (n,) of x (N, C), a block of logits at a time."""
    padding = -len(at) % HEAD_ROWS
    at_padded, targets = mx.array(np.pad(at, (0, padding)).astype(np.int32)), mx.pad(targets, (0, padding))
    parts = []
    for i in range(0, len(at), HEAD_ROWS):
        part = score_rows(x[at_padded[i : i + HEAD_ROWS]][None], targets[i : i + HEAD_ROWS])
        mx.eval(part)
        parts.append([np.array(array) for array in part])
    logprobs, is_greedy = (np.concatenate(arrays)[: len(at)] for arrays in zip(*parts, strict=True))
    return logprobs.astype(np.float64), is_greedy


def _score_logits(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    return -next_token_losses(logits, targets[None])[0], mx.argmax(logits[0], axis=-1) == targets


def continuation(tokenizer: Tokenizer, context: str, text: str, longest: int, where: str) -> ScoredText:
    """Tokenize a text after its context as lm-evaluation-harness does (``_encode_pair``, ``loglikelihood``).

    Both are encoded together; the text's tokens are those beyond as many as the context has alone. White space at the
    context's end moves to the text. An empty context is the start token. Too long a context loses its beginning.
    """
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, text = context[:-n_spaces], context[-n_spaces:] + text
    before = tokenizer.encode(context) if context else [tokenizer.start_id]
    ids = tokenizer.encode(context + text) if context else [tokenizer.start_id, *tokenizer.encode(text)]
    n = len(ids) - len(before)
    if not 0 < n <= longest:
        raise DataError(f"{where}: expected 1 to {longest} tokens to score (the model's context), found {n}")
    ids = ids[-longest - 1 :]
    return ScoredText(ids, len(ids) - n)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Return the mean and its standard error for independent samples; None for a single one."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def perplexity_and_error(logprobs: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Return exp(-mean) and its standard error by the delta method: the perplexity times that of the mean."""
    mean, error = mean_and_error(logprobs)
    perplexity = float(np.exp(-mean))
    return perplexity, None if error is None else perplexity * error
