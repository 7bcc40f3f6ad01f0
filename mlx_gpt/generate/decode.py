"""Let the model talk: the prompt in one pass, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.sampling import Sampler, make_sampler
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a prompt: yields the continuation piece by piece, whole characters only, without the prompt.

    Ends at ``<|endoftext|>``, after ``max_tokens`` tokens, or where the context (``n_positions``) is full. An empty
    prompt starts a new text. Raises ``UsageError`` for a prompt that does not fit and for settings out of range.
    """
    if max_tokens < 0:
        raise UsageError(f"max-tokens must be 0 or above, not {max_tokens}")
    if seed is not None and not 0 <= seed < 2**64:
        raise UsageError(f"seed must be 0 or above (and under 2^64), not {seed}")
    sampler = make_sampler(temperature, top_k, top_p, vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if len(ids) >= model.config.n_positions:
        raise UsageError(
            f"the prompt is {len(ids)} tokens long and the model's context is {model.config.n_positions}; "
            f"shorten it to at most {model.config.n_positions - 1}, so that there is room for an answer"
        )
    if seed is not None:
        mx.random.seed(seed)
    return _text(generate_tokens(model, ids, sampler, max_tokens, stop_id=tokenizer.eot_id), tokenizer)


def _text(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    stream = tokenizer.stream()
    for token_id in ids:
        if piece := stream.push(token_id):
            yield piece
    if piece := stream.flush():
        yield piece


def generate_tokens(
    model: GPT, prompt: Sequence[int], sampler: Sampler, max_tokens: int, stop_id: int | None = None
) -> Iterator[int]:
    """The ids after the prompt, one by one; ``stop_id`` ends them and is not among them.

    The model is put into eval mode. While one id is on its way to the reader, the next is already being computed.
    """
    model.eval()
    cache = model.make_cache()
    room = model.config.n_positions - len(prompt) + 1  # the last id may be sampled at the last position
    left = min(max_tokens, room)
    if left < 1:
        return
    token = sampler(model([list(prompt)], cache)[:, -1])  # (1,)
    mx.async_eval(token)
    while True:
        left -= 1
        if left:  # queue the next step before waiting for this one
            following = sampler(model(token[:, None], cache)[:, -1])
            mx.async_eval(following)
        token_id = int(token.item())  # type: ignore[arg-type]
        if token_id == stop_id:
            return
        yield token_id
        if not left:
            return
        token = following


def generate_many(
    model: GPT, prompt: Sequence[int], n: int, sampler: Sampler, max_tokens: int, stop_id: int
) -> list[list[int]]:
    """n continuations of one prompt side by side, each cut before its ``stop_id``."""
    model.eval()
    cache = model.make_cache()
    left = min(max_tokens, model.config.n_positions - len(prompt) + 1)
    if left < 1:
        return [[] for _ in range(n)]
    token = sampler(model([list(prompt)] * n, cache)[:, -1])  # (n,)
    drawn = [np.array(token)]
    over = drawn[0] == stop_id
    while len(drawn) < left and not over.all():
        token = sampler(model(token[:, None], cache)[:, -1])
        drawn.append(np.array(token))
        over |= drawn[-1] == stop_id
    rows = np.stack(drawn, axis=1)  # (n, tokens)
    ends = [np.flatnonzero(row == stop_id) for row in rows]
    return [row[: end[0] if end.size else None].tolist() for row, end in zip(rows, ends, strict=True)]
