"""How probable a model finds texts, token by token: what every evaluation is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT, checked_ids
from mlx_gpt.text.tokenizer import Tokenizer

TOKENS = 4096  # in a batch
ROWS = 256  # positions whose logits are in memory at once
STEP = 32  # lengths are rounded up to a multiple, so that few shapes are compiled

Progress = Callable[[int, int], None]  # is told how many texts are done, of how many


@dataclass(frozen=True)
class Scored:
    """Tokens to be scored: ``ids[first:]``, each given all before it."""

    ids: Sequence[int]
    first: int


@dataclass(frozen=True)
class Score:
    """Of each scored token: its log-probability in nats (n,), and whether none was more probable (n,)."""

    log_probs: np.ndarray
    is_greedy: np.ndarray


def score(model: GPT, texts: Sequence[Scored], progress: Progress | None = None) -> list[Score]:
    """The scores of some texts, in their order. Each text has at least one token before the first scored.

    Texts of like length share a batch, filled up on the right, where a causal model does not look. Only the scored
    positions go through the head.
    """
    hidden = mx.compile(lambda ids: model.hidden(ids))
    judge = mx.compile(lambda x, targets: _judge(model.logits(x), targets))
    scores: dict[int, Score] = {}
    for rows, T in batches([len(text.ids) - 1 for text in texts], model.config.n_positions):
        B = max(1, TOKENS // T)
        ids = np.zeros((B, T), np.int64)
        for row, i in enumerate(rows):
            ids[row, : len(texts[i].ids) - 1] = texts[i].ids[:-1]
        at = np.concatenate([row * T + np.arange(texts[i].first, len(texts[i].ids)) - 1 for row, i in enumerate(rows)])
        targets = np.concatenate([texts[i].ids[texts[i].first :] for i in rows])
        x = hidden(checked_ids(ids, model.config.vocab_size)).reshape(B * T, -1)  # (B*T, C)
        log_probs, is_greedy = _through_the_head(judge, x, at, checked_ids(targets, model.config.vocab_size))
        ends = np.cumsum([len(texts[i].ids) - texts[i].first for i in rows])[:-1]
        parts = zip(rows, np.split(log_probs, ends), np.split(is_greedy, ends), strict=True)
        scores |= {i: Score(*of_text) for i, *of_text in parts}
        if progress:
            progress(len(scores), len(texts))
    return [scores[i] for i in range(len(texts))]


def batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Which texts go together, and the length T they are filled up to: the longest first, as memory is then known."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        T = min(longest, -(-lengths[order[0]] // STEP) * STEP)
        B = max(1, TOKENS // T)
        yield order[:B], T
        order = order[B:]


def _through_the_head(
    judge: Callable[..., tuple[mx.array, mx.array]], x: mx.array, at: np.ndarray, targets: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and whether greedy of the targets after the positions ``at`` of x (N, C)."""
    padding = -len(at) % ROWS
    places, wanted = mx.array(np.pad(at, (0, padding)).astype(np.int32)), mx.pad(targets, (0, padding))
    parts = []
    for i in range(0, len(at), ROWS):
        part = judge(x[places[i : i + ROWS]][None], wanted[i : i + ROWS])
        mx.eval(part)  # one block of logits in memory
        parts.append([np.array(array) for array in part])
    log_probs, is_greedy = (np.concatenate(arrays)[: len(at)] for arrays in zip(*parts, strict=True))
    return log_probs.astype(np.float64), is_greedy


def _judge(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    logits = logits[0].astype(mx.float32)  # (N, V)
    of_target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return of_target - mx.logsumexp(logits, axis=-1), mx.argmax(logits, axis=-1) == targets


def continuation(tokenizer: Tokenizer, context: str, text: str, longest: int, where: str) -> Scored:
    """A text that continues a context, tokenized as lm-evaluation-harness does (``_encode_pair``, ``loglikelihood``).

    Both are encoded as one, and the context's share is as many tokens as it has alone; white space at its end goes to
    the continuation. No context is ``<|endoftext|>``. What is too long loses its beginning.
    """
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, text = context[:-n_spaces], context[-n_spaces:] + text
    before = tokenizer.encode(context) if context else [tokenizer.eot_id]
    ids = tokenizer.encode(context + text) if context else [tokenizer.eot_id, *tokenizer.encode(text)]
    n = len(ids) - len(before)
    if not 0 < n <= longest:
        raise DataError(f"{where}: expected 1 to {longest} tokens to score (the model's context), found {n}")
    ids = ids[-longest - 1 :]
    return Scored(ids, len(ids) - n)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The mean and its standard error, as of independent draws; None for a single one."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def perplexity_and_error(log_probs: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """exp(-mean), and by the delta method its standard error: the perplexity times that of the mean."""
    mean, error = mean_and_error(log_probs)
    perplexity = float(np.exp(-mean))
    return perplexity, None if error is None else perplexity * error
