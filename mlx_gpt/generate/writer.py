"""From ids to text that may be shown: whole characters, nothing of a stop string, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_gpt.generate.settings import Settings
from mlx_gpt.text.tokenizer import Tokenizer

END = "end"  # the model ended its text with <|endoftext|>
STOP = "stop"  # a stop string came
LENGTH = "length"  # max_tokens
CONTEXT = "context"  # the model's context is full


class Token(NamedTuple):
    """An id that was chosen; where asked for, its log-probability in the model's own distribution, before any rule,
    in nats, and the most probable ids with theirs.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """A token and the text that it brought: "" inside a character, less than its own where a stop string begins.

    Bytes that never became a character come last, as U+FFFD without a token.
    """

    text: str
    token: Token | None


class Writer:
    """Takes the tokens of one row as they are chosen, gives the pieces that may be shown.

    At most ``limit`` tokens are taken. ``reason`` says why the text ended, once it has.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings, limit: int):
        self._end_id = tokenizer.eot_id
        self._stops = settings.stop
        self._limit = limit
        self._at_limit = LENGTH if limit == settings.max_tokens else CONTEXT
        self._characters = tokenizer.stream()
        self._held: list[Piece] = []  # what may turn out to be the beginning of a stop string
        self._taken = 0
        self.reason: str | None = None if limit else self._at_limit

    def push(self, token: Token) -> list[Piece]:
        """The pieces that a new token sets free; none after the end."""
        if self.reason:
            return []
        if token.id == self._end_id:
            return self._finish(END)
        self._taken += 1
        self._held.append(Piece(self._characters.push(token.id), token))
        free, found = showable("".join(piece.text for piece in self._held), self._stops)
        if found:
            self.reason = STOP
            return self._release(free, cut=True)
        if self._taken == self._limit:
            return self._finish(self._at_limit)
        return self._release(free)

    def _finish(self, reason: str) -> list[Piece]:
        self.reason = reason
        rest = self._characters.flush()
        return self._held + ([Piece(rest, None)] if rest else [])

    def _release(self, free: int, cut: bool = False) -> list[Piece]:
        """Of the pieces held, those that lie within the first ``free`` characters; with ``cut`` half a piece too."""
        pieces = []
        while self._held and len(self._held[0].text) <= free:
            free -= len(self._held[0].text)
            pieces.append(self._held.pop(0))
        if cut and free:
            pieces.append(self._held[0]._replace(text=self._held[0].text[:free]))
        return pieces


def showable(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    """How much of a text may be shown, in characters, and whether a stop string has come.

    All before the stop string that is complete first or, while there is none, before what may become one:
    ``showable("that's all fo", ["folks"])`` is (11, False).
    """
    ends = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if ends:
        return min(ends)[1], True
    begun = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    return len(text) - max(begun, default=0), False
