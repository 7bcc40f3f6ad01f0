"""Text generation: read the prompts in one pass, then compute each token while the one before it is shown."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.beam import beam_search
from mlx_gpt.generate.decoder import NO_TOKEN, Decoder, pad_rows
from mlx_gpt.generate.history import History
from mlx_gpt.generate.prompt_cache import PromptCache
from mlx_gpt.generate.rng import row_keys
from mlx_gpt.generate.sampler import Sampler, Vocabulary, no_token_error
from mlx_gpt.generate.settings import SLIDE, GenerationSettings
from mlx_gpt.generate.speculative import Draft, DraftModel, PromptLookup, speculate
from mlx_gpt.generate.stats import GenerationStats
from mlx_gpt.generate.writer import Piece, Token, Writer
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

LOOKUP = "lookup"


def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str = "", *, draft: GPT | str | None = None, **settings: Any
) -> Iterator[str]:
    """Continue a prompt: yield the continuation in pieces of whole characters, without the prompt.

    ``settings`` are the fields of ``GenerationSettings``: ``temperature=0.7, top_p=0.9, stop=("\\n",)``. Ends at
    an end token, at a stop string, after ``max_tokens`` or where the context (``n_positions``) is full. An empty
    prompt starts a new text. Raises ``UsageError`` for invalid settings and for a prompt that is too long; with
    ``context="slide"`` its last ``n_positions - 1`` tokens are read instead.
    """
    generation = Generation(model, tokenizer, [tokenizer.encode_prompt(prompt)], GenerationSettings(**settings), draft)
    return (piece.text for _, piece in generation if piece.text)


def generate_tokens(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], *, draft: GPT | str | None = None, **settings: Any
) -> Iterator[int]:
    """Continue a prompt given as ids: yield the new ids, without that of the end token."""
    generation = Generation(model, tokenizer, [prompt], GenerationSettings(**settings), draft)
    return (piece.token.id for _, piece in generation if piece.token)


def generate_many(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], **settings: Any) -> list[str]:
    """Return the continuations of several prompts, computed in one batch; each is the same as alone."""
    texts = [""] * len(prompts)
    if prompts:
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        for row, piece in Generation(model, tokenizer, ids, GenerationSettings(**settings)):
            texts[row] += piece.text
    return texts


class Generation:
    """The continuations of a batch of prompts, given as ids: iterate over it, once, for (row, piece).

    Afterwards ``reasons`` holds why each row ended, and ``stats`` the speed. ``n_dropped`` tokens of the longest prompt
    did not fit into a context that slides, and are not read. ``draft``, for one prompt, is a smaller
    model that proposes tokens, or ``LOOKUP``, which proposes them from the text. ``prefix`` is a text read earlier that
    precedes every prompt. Raises ``UsageError`` like ``generate`` before anything is computed, and during the iteration
    if the rules forbid every token.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        draft: GPT | str | None = None,
        prefix: PromptCache | None = None,
    ):
        if prefix:
            if settings.cache_bits not in (None, prefix.bits):
                raise UsageError(
                    f"--cache-bits {settings.cache_bits} differs from the file of --prompt-cache; leave it out, "
                    f"the file sets it"
                )
            settings = replace(settings, cache_bits=prefix.bits)
            prompts = [[*prefix.ids, *prompt] for prompt in prompts]
        rows = [list(prompt) or [tokenizer.start_id] for prompt in prompts]
        longest, most = max(map(len, rows)), model.config.n_positions - 1
        self.n_dropped = max(0, longest - most) if settings.context == SLIDE else 0
        if self.n_dropped:
            rows, prefix = [row[-most:] for row in rows], None
        if (prefix or settings.context == SLIDE) and len({len(row) for row in rows}) > 1:
            raise UsageError(
                "--context slide and --prompt-cache need prompts of one length; take them one after the other"
            )
        self.limits = [_limit(len(row), model.config.n_positions, settings) for row in rows]
        if settings.beams > 1:
            others = {
                "--samples": len(rows) > 1,
                "a draft": draft,
                "--logprobs or --colour": settings.logprobs is not None,
            }
            if given := [name for name, is_given in others.items() if is_given]:
                raise UsageError(
                    f"--beams gives the best text of one prompt, without {' or '.join(given)}; leave out one"
                )
            settings = replace(settings, temperature=0)  # nothing is drawn
        self.settings = settings
        keys = row_keys(settings.seed, len(rows))
        self.sampler = Sampler([settings], Vocabulary(tokenizer, model.config.vocab_size), keys)
        self.decoder = Decoder(model, settings.cache_bits)
        self.draft = _draft(draft, self.sampler, len(rows))
        self.prompts = pad_rows(rows, model.config.vocab_size)
        self.writers = [Writer(tokenizer, settings, limit) for limit in self.limits]
        self._prefix = prefix
        self._n_prefix = min(len(prefix.ids), len(rows[0]) - 1) if prefix else 0  # at least the last token is read
        self.stats = GenerationStats(model, sum(map(len, rows)) - self._n_prefix * len(rows))
        self._prompt_logits: mx.array | None = None

    @property
    def reasons(self) -> list[str | None]:
        return [writer.reason for writer in self.writers]

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        self.stats.start()
        steps = self._search() if self.settings.beams > 1 else self._speculate() if self.draft else self._decode()
        with closing(steps):
            while not all(self.reasons):
                rows = next(steps)
                self.stats.count(
                    sum(len(tokens) for tokens, reason in zip(rows, self.reasons, strict=True) if not reason)
                )
                for row, tokens in enumerate(rows):
                    for token in tokens:
                        if token.id == NO_TOKEN and not self.writers[row].reason:
                            raise no_token_error([self.settings])
                        yield from ((row, piece) for piece in self.writers[row].push(token))

    def read_prompt(self) -> mx.array:
        """Return the logits after the prompts, (B, V); they are computed once."""
        if self._prompt_logits is None:
            self._prompt_logits = (
                self.decoder.prefill_after(self._prefix.state, self._n_prefix, self.prompts)
                if self._prefix and self._n_prefix
                else self.decoder.prefill(self.prompts)
            )
        return self._prompt_logits

    def _search(self) -> Generator[list[list[Token]], None, None]:
        """Yield the tokens of the best text of a beam search, all at once."""
        beams = beam_search(self.decoder, self.sampler, self.prompts, self.read_prompt(), self.limits[0])
        yield [[Token(i) for i in (beams[0].ids if beams else [NO_TOKEN])]]

    def _speculate(self) -> Generator[list[list[Token]], None, None]:
        """Yield the tokens of the one row, several at each step."""
        assert self.draft
        history = History(self.prompts, self.limits)
        for ids, logits in speculate(self.decoder, self.sampler, self.draft, history, self.read_prompt()):
            yield [as_tokens(with_logprobs(mx.array(ids), logits, self.settings.logprobs))]

    def _decode(self) -> Generator[list[list[Token]], None, None]:
        """Yield one token per row and step. While it is shown, the next is computed.

        The first is yielded at once: it does not wait for the compilation of the step.
        """
        history = History(self.prompts, self.limits)
        pending: list[mx.array] = []
        n_steps = max(self.limits)
        try:
            for n in range(n_steps):
                ids, logits = self._next(history, pending[0]) if n else self._choose(self.read_prompt(), history)
                chosen = with_logprobs(ids, logits, self.settings.logprobs)
                mx.async_eval(chosen)
                history = history.then(ids[:, None])
                if n != 1:
                    yield [[token] for token in as_tokens(pending or chosen)]
                pending = chosen
            if n_steps > 1:
                yield [[token] for token in as_tokens(pending)]
        finally:
            mx.eval(pending)  # nothing is being computed when the program ends

    def _next(self, history: History, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Read one more token per row, (B,); return the next ids, (B,), and the logits they were chosen by, (B, V)."""
        P = self.decoder.model.config.n_positions
        if self.settings.context == SLIDE and self.decoder.offset == P:
            return self._choose(self.decoder.prefill(history.ids[:, -(P // 2) :]), history)
        if self.sampler.needs_history:
            return self._choose(self.decoder.step(ids[:, None])[:, -1], history)
        return self.decoder.step_and_choose(ids, self.sampler.choose, self.sampler.inputs(history))

    def _choose(self, logits: mx.array, history: History) -> tuple[mx.array, mx.array]:
        return self.sampler.choose(logits, self.sampler.inputs(history), history), logits


def with_logprobs(ids: mx.array, logits: mx.array, n: int | None) -> list[mx.array]:
    """Return the ids, (B,), and unless n is None their log-probabilities, (B,), in nats.

    These are followed by the n most probable ids and their log-probabilities, (B, n) each, unordered.
    """
    if n is None:
        return [ids]
    logp = nn.log_softmax(logits.astype(mx.float32))
    n = min(n, logp.shape[-1])
    top = mx.argpartition(-logp, kth=max(n - 1, 0), axis=-1)[:, :n]
    chosen = mx.take_along_axis(logp, mx.maximum(ids, 0)[:, None], axis=-1)
    return [ids, chosen[:, 0], top, mx.take_along_axis(logp, top, axis=-1)]


def as_tokens(chosen: list[mx.array]) -> list[Token]:
    """Return the ids, (N,), and log-probabilities of a step as Python values; waits for their computation."""
    ids, *rest = (np.array(array) for array in chosen)
    if not rest:
        return [Token(int(token_id)) for token_id in ids]
    logprob, top, values = rest
    return [
        Token(int(ids[row]), float(logprob[row]), tuple((int(top[row, i]), float(values[row, i])) for i in order))
        for row, order in enumerate(np.argsort(-values, axis=-1))
    ]


def _limit(length: int, n_positions: int, settings: GenerationSettings) -> int:
    """Return how many tokens may follow a prompt of this length; ``UsageError`` if none."""
    if length >= n_positions:
        raise UsageError(
            f"the prompt is {length} tokens long and the model's context is {n_positions}; "
            f"shorten it to at most {n_positions - 1}, so that there is room for an answer, or let it slide "
            f"(--context slide)"
        )
    room = n_positions - length + 1  # the last token is drawn at the last position and not read
    return settings.max_tokens if settings.context == SLIDE else min(settings.max_tokens, room)


def _draft(draft: GPT | str | None, sampler: Sampler, n_rows: int) -> Draft | None:
    """Return the draft; ``UsageError`` if it cannot be used."""
    if draft is None:
        return None
    if n_rows > 1:
        raise UsageError("a draft is for one prompt at a time; take them one after the other")
    if isinstance(draft, str):
        return PromptLookup()
    tokenizer, size = sampler.vocabulary.tokenizer, draft.config.vocab_size
    if size < tokenizer.vocab_size:
        raise UsageError(
            f"the draft model has {size} ids and the tokenizer {tokenizer.vocab_size}: it has another vocabulary; "
            f"take a smaller model with the same tokenizer"
        )
    return DraftModel(draft, Sampler(sampler.settings, Vocabulary(tokenizer, size), sampler.keys))
