"""A text written in turns by a user and the model, any of which can be undone."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.prompt_cache import PromptCache
from mlx_gpt.generate.settings import SLIDE, GenerationSettings
from mlx_gpt.generate.speculative import common_prefix, id_list
from mlx_gpt.generate.writer import STOP, Piece
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


class Turn(NamedTuple):
    """The length of the text in ids before a turn, and before the model's part of it."""

    start: int
    answer: int


class Session:
    """The text so far, as ``ids``, and the ``settings`` of its continuation, which may be replaced between turns.

    The cache is kept between turns, so that a turn reads only new tokens. Each continuation has a seed derived from the
    settings' seed: the same turns give the same text. ``reason`` says why the last continuation ended.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: GenerationSettings, draft: GPT | str | None = None):
        self.settings = settings
        self.ids: list[int] = []
        self.reason: str | None = None
        self._model, self._tokenizer, self._draft = model, tokenizer, draft
        self._turns: list[Turn] = []
        self._cache: PromptCache | None = None
        self._n_answers = 0

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids[len(self._tokenizer.settings.prefix) :])

    def extend(self, words: str = "") -> Generator[Piece, None, None]:
        """Append words to the text and let the model continue it: yield the pieces of the continuation."""
        new = self._tokenizer.encode(with_space(self.text, words), is_start=not self.ids)
        ids = [*(self.ids or self._tokenizer.settings.prefix), *new]
        return self._answer(ids, [*self._turns, Turn(len(self.ids), len(ids))])

    def retry(self) -> Generator[Piece, None, None]:
        """Replace the model's last continuation by another."""
        if not self._turns:
            raise UsageError("there is no text to continue; write some, or press return")
        return self._answer(self.ids[: self._turns[-1].answer], self._turns)

    def undo(self) -> None:
        """Remove the last turn, the user's part and the model's."""
        if not self._turns:
            raise UsageError("there is no turn to undo")
        del self.ids[self._turns.pop().start :]

    def clear(self) -> None:
        """Start a new text."""
        self.ids, self._turns = [], []

    def _answer(self, ids: list[int], turns: list[Turn]) -> Generator[Piece, None, None]:
        run = self._generation(ids)  # may raise: the session is unchanged until then
        self.ids, self._turns, self._cache, self.reason = ids, turns, None, None
        return self._generate(run)

    def _generation(self, ids: list[int]) -> Generation:
        settings, P = self.settings, self._model.config.n_positions
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + self._n_answers) % 2**64)
        if len(ids) >= P and settings.context != SLIDE:
            raise UsageError(
                f"the text is {len(ids)} tokens long and the model's context is {P}; let it slide (:context slide), "
                f"undo a turn (:undo) or start a new text (:new)"
            )
        ids = ids if len(ids) < P else ids[-(P // 2) :]
        prefix = self._cached_prefix(ids)
        new = ids[len(prefix.ids) :] if prefix else ids
        run = Generation(self._model, self._tokenizer, [new], settings, self._draft, prefix)
        self._n_answers += 1
        return run

    def _cached_prefix(self, ids: list[int]) -> PromptCache | None:
        """Return the part of the cache that these ids begin with."""
        if not self._cache or self._cache.bits != self.settings.cache_bits:
            return None
        n = common_prefix(self._cache.ids, ids)
        return self._cache._replace(ids=ids[:n]) if n else None

    def _generate(self, run: Generation) -> Generator[Piece, None, None]:
        ids: list[int] = []
        text, start = "", len(self.ids)
        for _, piece in run:
            text += piece.text
            if piece.token:
                ids.append(piece.token.id)
                self.ids.append(piece.token.id)
            yield piece
        self.reason = run.reasons[0]
        if self.reason == STOP and self._tokenizer.decode(ids) != text:  # the last token is cut at the stop string
            self.ids[start:] = self._tokenizer.encode(text, is_start=False)
        self._cache = cache_of(run, ids)


def cache_of(run: Generation, generated: list[int]) -> PromptCache | None:
    """Return the cache of a run that generated these ids; None if it does not hold the beginning of the text."""
    decoder, prompt = run.decoder, id_list(run.prompts[0])
    has_slid = len(prompt) + len(generated) >= decoder.model.config.n_positions
    if run.draft or run.settings.beams > 1 or has_slid or not decoder.offset:
        return None
    return PromptCache([*prompt, *generated][: decoder.offset], decoder.state(), decoder.bits)


def with_space(text: str, words: str) -> str:
    """Return the words, after a space if they would otherwise join the last word of the text."""
    needs_space = bool(text) and not text[-1].isspace() and words[:1].isascii() and words[:1].isalnum()
    return " " + words if needs_space else words
