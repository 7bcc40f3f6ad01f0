"""A text that grows turn by turn: somebody writes some of it, the model goes on, and either can be taken back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.prompt_cache import PromptCache
from mlx_gpt.generate.settings import SLIDE, Settings
from mlx_gpt.generate.speculative import numbers
from mlx_gpt.generate.writer import STOP, Piece
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


class Turn(NamedTuple):
    """How long the text was, in ids, before a turn, and where in it the model went on."""

    start: int
    answer: int


class Session:
    """The text so far, as ``ids``, and the ``settings`` by which it goes on, which may be replaced between turns.

    What the model has read of the text is kept, so that a turn costs its own tokens only. With a seed every
    continuation has one of its own, and the same turns give the same text. ``reason`` says why the last one ended.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: Settings, draft: GPT | str | None = None):
        self.settings = settings
        self.ids: list[int] = []
        self.reason: str | None = None
        self._model, self._tokenizer, self._draft = model, tokenizer, draft
        self._turns: list[Turn] = []
        self._read: PromptCache | None = None
        self._n_answers = 0

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids)

    def go_on(self, words: str = "") -> Generator[Piece, None, None]:
        """Put words at the end of the text, then let the model go on: yields the pieces of what it says."""
        ids = self.ids + self._tokenizer.encode(joined(self.text, words))
        return self._answer(ids, [*self._turns, Turn(len(self.ids), len(ids))])

    def again(self) -> Generator[Piece, None, None]:
        """Take back what the model said last, and let it say something else."""
        if not self._turns:
            raise UsageError("nothing has been said yet; write something, or press return")
        return self._answer(self.ids[: self._turns[-1].answer], self._turns)

    def undo(self) -> None:
        """Take back the last turn: what was written and what the model said."""
        if not self._turns:
            raise UsageError("there is nothing to take back")
        del self.ids[self._turns.pop().start :]

    def clear(self) -> None:
        """Begin a new text."""
        self.ids, self._turns = [], []

    def _answer(self, ids: list[int], turns: list[Turn]) -> Generator[Piece, None, None]:
        run = self._generation(ids)  # where this is refused, all is as it was
        self.ids, self._turns, self._read, self.reason = ids, turns, None, None
        return self._say(run)

    def _generation(self, ids: list[int]) -> Generation:
        given, P = self.settings, self._model.config.n_positions
        if given.seed is not None:
            given = replace(given, seed=(given.seed + self._n_answers) % 2**64)
        if len(ids) >= P and given.context != SLIDE:
            raise UsageError(
                f"the text is {len(ids)} tokens long and the model's context is {P}; let it slide (:context slide), "
                f"take a turn back (:undo) or begin anew (:new)"
            )
        ids = ids if len(ids) < P else ids[-(P // 2) :]
        before = self._known(ids)
        new = ids[len(before.ids) :] if before else ids
        run = Generation(self._model, self._tokenizer, [new], given, self._draft, before)
        self._n_answers += 1
        return run

    def _known(self, ids: list[int]) -> PromptCache | None:
        """As much of what has been read as these ids begin with."""
        if not self._read or self._read.bits != self.settings.cache_bits:
            return None
        n = agreeing(self._read.ids, ids)
        return self._read._replace(ids=ids[:n]) if n else None

    def _say(self, run: Generation) -> Generator[Piece, None, None]:
        ids: list[int] = []
        text, start = "", len(self.ids)
        for _, piece in run:
            text += piece.text
            if piece.token:
                ids.append(piece.token.id)
                self.ids.append(piece.token.id)
            yield piece
        self.reason = run.reasons[0]
        if self.reason == STOP and self._tokenizer.decode(ids) != text:
            self.ids[start:] = self._tokenizer.encode(text)  # the last token is cut where the stop string begins
        self._read = what_was_read(run, ids)


def what_was_read(run: Generation, said: list[int]) -> PromptCache | None:
    """What the model has read in a run that said these ids; None where its cache holds no beginning of the text."""
    decoder, prompt = run.decoder, numbers(run.prompts[0])
    has_slid = len(prompt) + len(said) >= decoder.model.config.n_positions
    if run.draft or run.settings.beams > 1 or has_slid or not decoder.offset:
        return None
    kept = [(layer.keys, layer.values) for layer in decoder.cache]
    return PromptCache([*prompt, *said][: decoder.offset], kept, decoder.bits)


def agreeing(a: list[int], b: list[int]) -> int:
    """How many ids at the beginning of both are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def joined(text: str, words: str) -> str:
    """The words as they follow a text: behind a space where a word would run into the last one."""
    needs_space = bool(text) and not text[-1].isspace() and words[:1].isascii() and words[:1].isalnum()
    return " " + words if needs_space else words
