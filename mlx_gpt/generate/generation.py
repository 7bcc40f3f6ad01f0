"""Let the model talk: the prompts in one pass, then a token at a time, the next on its way while the last is shown."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.beam import beam_search
from mlx_gpt.generate.decoder import Decoder, side_by_side
from mlx_gpt.generate.memory import held_in_memory
from mlx_gpt.generate.prompt_cache import PromptCache
from mlx_gpt.generate.rng import row_keys
from mlx_gpt.generate.sampler import NOTHING, Said, Sampler
from mlx_gpt.generate.settings import SLIDE, Settings
from mlx_gpt.generate.speculative import Draft, DraftModel, PromptLookup, speculate
from mlx_gpt.generate.stats import Figures
from mlx_gpt.generate.writer import Piece, Token, Writer
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

LOOKUP = "lookup"


def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str = "", *, draft: GPT | str | None = None, **settings: Any
) -> Iterator[str]:
    """Continue a prompt: yields the continuation piece by piece, whole characters only, without the prompt.

    ``settings`` are the fields of ``Settings``: ``temperature=0.7, top_p=0.9, stop=("\\n",), max_tokens=100``. Ends at
    ``<|endoftext|>``, at a stop string, after ``max_tokens`` or where the context (``n_positions``) is full. An empty
    prompt starts a new text. Raises ``UsageError`` for a prompt that does not fit and for settings that make no sense.
    """
    generation = Generation(model, tokenizer, [tokenizer.encode(prompt)], Settings(**settings), draft)
    return (piece.text for _, piece in generation if piece.text)


def generate_tokens(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], *, draft: GPT | str | None = None, **settings: Any
) -> Iterator[int]:
    """The same in ids: those after the prompt's, one by one; the one that ends the text is not among them."""
    generation = Generation(model, tokenizer, [prompt], Settings(**settings), draft)
    return (piece.token.id for _, piece in generation if piece.token)


def generate_many(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], **settings: Any) -> list[str]:
    """The continuations of several prompts, computed side by side; each is what it would be alone."""
    texts = [""] * len(prompts)
    if prompts:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        for row, piece in Generation(model, tokenizer, ids, Settings(**settings)):
            texts[row] += piece.text
    return texts


class Generation:
    """The continuations of prompts, given as ids, side by side: iterate over it, once, for (row, piece).

    Then ``reasons`` says why each row ended, and ``figures`` how long it took. Raises ``UsageError`` as above, before
    anything is computed; and on the way where the rules leave no token to say. ``draft``, for one prompt, is a smaller
    model that guesses ahead, or ``LOOKUP``: the text so far does. ``before`` is a text that has been read, and stands
    before every prompt.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        draft: GPT | str | None = None,
        before: PromptCache | None = None,
    ):
        if before:
            if settings.cache_bits not in (None, before.bits):
                raise UsageError(
                    f"--cache-bits {settings.cache_bits} is not how the prompt was kept; leave it out, "
                    f"the file of --prompt-cache says how"
                )
            settings = replace(settings, cache_bits=before.bits)
            prompts = [[*before.ids, *prompt] for prompt in prompts]
        rows = [list(prompt) or [tokenizer.eot_id] for prompt in prompts]
        if (before or settings.context == SLIDE) and len({len(row) for row in rows}) > 1:
            raise UsageError(
                "--context slide and --prompt-cache need prompts of one length; take them one after the other"
            )
        limits = [_limit(len(row), model.config.n_positions, settings) for row in rows]
        if settings.beams > 1 and (
            len(rows) > 1 or draft or settings.context == SLIDE or settings.logprobs is not None
        ):
            raise UsageError("beam search is for one prompt, without a draft, --context slide or --logprobs")
        if settings.beams > 1:
            settings = replace(settings, temperature=0)  # nothing is drawn
        self.settings = settings
        self.sampler = Sampler(settings, tokenizer, model.config.vocab_size)
        self.decoder = Decoder(model, settings.cache_bits)
        self.before = before
        self.draft = _draft(draft, settings, tokenizer, len(rows))
        self.prompts = side_by_side(rows, model.config.vocab_size)
        self.limits = mx.array(limits)
        self.n_steps = max(limits)
        self.keys = row_keys(settings.seed, len(rows))
        self.writers = [Writer(tokenizer, settings, limit) for limit in limits]
        self.n_known = min(len(before.ids), len(rows[0]) - 1) if before else 0  # the last is read in any case
        self.figures = Figures(model, sum(map(len, rows)) - self.n_known * len(rows))
        self._first: mx.array | None = None

    @property
    def reasons(self) -> list[str | None]:
        return [writer.reason for writer in self.writers]

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        self.figures.start()
        steps = self._found() if self.settings.beams > 1 else self._guessed(self.draft) if self.draft else self._steps()
        with held_in_memory(self.figures.weight_bytes), closing(steps):
            while not all(self.reasons):
                rows = next(steps)
                self.figures.count(
                    sum(len(tokens) for tokens, reason in zip(rows, self.reasons, strict=True) if not reason)
                )
                for row, tokens in enumerate(rows):
                    for token in tokens:
                        yield from ((row, piece) for piece in self._write(row, token))

    def read_prompt(self) -> mx.array:
        """Logits after the prompts, (B, V); read once, before the first token or when somebody asks."""
        if self._first is None:
            self._first = (
                self.decoder.resume(self.before.kept, self.n_known, self.prompts)
                if self.before and self.n_known
                else self.decoder.prefill(self.prompts)
            )
        return self._first

    def _write(self, row: int, token: Token) -> list[Piece]:
        if token.id == NOTHING and not self.writers[row].reason:
            raise self.sampler.nothing_left()
        return self.writers[row].push(token)

    def _found(self) -> Generator[list[list[Token]], None, None]:
        """The tokens of the one row, all at once: the best text of a beam search."""
        beams = beam_search(self.decoder, self.sampler, self.prompts, self.read_prompt(), self.n_steps)
        yield [[Token(i) for i in (beams[0].ids if beams else [NOTHING])]]

    def _guessed(self, draft: Draft) -> Generator[list[list[Token]], None, None]:
        """The tokens of the one row, several at each step."""
        said = Said(self.prompts, self.limits)
        for ids, logits in speculate(self.decoder, self.sampler, draft, said, self.read_prompt(), self.keys):
            yield [as_tokens(self._looked_at(mx.array(ids), logits))]

    def _steps(self) -> Generator[list[list[Token]], None, None]:
        """The tokens of all rows, step by step. While one is on its way to the reader, the next is being computed.

        But the first: it does not wait until the compiled step has been made.
        """
        said = Said(self.prompts, self.limits)
        waiting: list[mx.array] = []
        try:
            for n in range(self.n_steps):
                ids, logits = self._next(said, waiting[0]) if n else self._choose(self.read_prompt(), said)
                chosen = self._looked_at(ids, logits)
                mx.async_eval(chosen)
                said.add(ids)
                if n != 1:
                    yield [[token] for token in as_tokens(waiting or chosen)]
                waiting = chosen
            if self.n_steps > 1:
                yield [[token] for token in as_tokens(waiting)]
        finally:
            mx.eval(waiting)  # nothing is left on its way when the program ends

    def _looked_at(self, ids: mx.array, logits: mx.array) -> list[mx.array]:
        """The ids, (N,), and where it was asked for, their log-probabilities and the most probable ids'."""
        return [ids] if self.settings.logprobs is None else [ids, *logprobs(logits, ids, self.settings.logprobs)]

    def _next(self, said: Said, ids: mx.array) -> tuple[mx.array, mx.array]:
        """The ids after one token more, (B,), and the logits that they were chosen by, (B, V)."""
        P = self.decoder.model.config.n_positions
        if self.settings.context == SLIDE and self.decoder.offset == P:
            return self._choose(self.decoder.prefill(said.ids[:, -(P // 2) :]), said)
        if self.sampler.looks_back:
            return self._choose(self.decoder.step(ids[:, None])[:, -1], said)
        return self.decoder.turn(ids, self.sampler.choose, self.sampler.inputs(said, self.keys))

    def _choose(self, logits: mx.array, said: Said) -> tuple[mx.array, mx.array]:
        return self.sampler.choose(logits, self.sampler.inputs(said, self.keys), said), logits


def logprobs(logits: mx.array, ids: mx.array, n: int) -> list[mx.array]:
    """The log-probabilities of the ids, (B,), and the n most probable ids with theirs, (B, n) each; in nats.

    The n come in no order.
    """
    logits = logits.astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    n = min(n, logp.shape[-1])
    top = mx.argpartition(-logp, kth=max(n - 1, 0), axis=-1)[:, :n]
    chosen = mx.take_along_axis(logp, mx.maximum(ids, 0)[:, None], axis=-1)
    return [chosen[:, 0], top, mx.take_along_axis(logp, top, axis=-1)]


def as_tokens(chosen: list[mx.array]) -> list[Token]:
    """The choice of a step for each row, out of MLX; waits until it has been computed."""
    ids, *rest = (np.array(array) for array in chosen)
    if not rest:
        return [Token(int(token_id)) for token_id in ids]
    logprob, top, values = rest
    return [
        Token(int(ids[row]), float(logprob[row]), tuple((int(top[row, i]), float(values[row, i])) for i in order))
        for row, order in enumerate(np.argsort(-values, axis=-1))
    ]


def _limit(length: int, n_positions: int, settings: Settings) -> int:
    """How many tokens may follow a prompt of this length; ``UsageError`` where none fits."""
    if length >= n_positions:
        raise UsageError(
            f"the prompt is {length} tokens long and the model's context is {n_positions}; "
            f"shorten it to at most {n_positions - 1}, so that there is room for an answer"
        )
    room = n_positions - length + 1  # the last may be drawn at the last position and is not looked at
    return settings.max_tokens if settings.context == SLIDE else min(settings.max_tokens, room)


def _draft(draft: GPT | str | None, settings: Settings, tokenizer: Tokenizer, n_rows: int) -> Draft | None:
    """What guesses ahead; ``UsageError`` where it cannot."""
    if draft is None:
        return None
    if n_rows > 1:
        raise UsageError("a draft guesses for one prompt at a time; take them one after the other")
    if isinstance(draft, str):
        return PromptLookup()
    if draft.config.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"the draft model has {draft.config.vocab_size} ids and the tokenizer {tokenizer.vocab_size}: it speaks "
            f"another vocabulary; take a smaller model with the same tokenizer"
        )
    return DraftModel(draft, Sampler(settings, tokenizer, draft.config.vocab_size))
