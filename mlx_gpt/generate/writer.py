"""Text from generated ids: whole characters only, cut at stop strings, with the reason for its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.text.tokenizer import Tokenizer

END = "end"  # the model generated an end token
STOP = "stop"  # the text contains a stop string, or one of stop_token_ids was generated
LENGTH = "length"  # max_tokens
CONTEXT = "context"  # the model's context is full


class Token(NamedTuple):
    """A generated id. On request also its log-probability in nats and the most probable ids with theirs.

    Log-probabilities are the model's own, before any sampling rule.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """A token and its text: "" while a character is incomplete, cut where a stop string begins.

    Bytes that never completed a character follow at the end as U+FFFD, without a token.
    """

    text: str
    token: Token | None


class Writer:
    """Turns the tokens of one row into pieces of text, for at most ``limit`` tokens.

    ``reason`` is why the text ended, None until then; ``n_tokens`` counts the tokens before its end.
    """

    def __init__(self, tokenizer: Tokenizer, settings: GenerationSettings, limit: int):
        self._end_ids = frozenset(() if settings.ignore_eos else tokenizer.end_ids)
        self._ignored_ids = frozenset(tokenizer.end_ids) - self._end_ids
        self._stop_ids = frozenset(settings.stop_token_ids)
        self._stops = settings.stop
        self.limit = limit
        self._at_limit = LENGTH if limit == settings.max_tokens else CONTEXT
        self._characters = tokenizer.stream()
        self._held: list[Piece] = []  # may be the beginning of a stop string
        self.n_tokens = 0
        self.reason: str | None = None if limit else self._at_limit

    def push(self, token: Token) -> list[Piece]:
        """Add a token and return the pieces that are now certain; none after the end."""
        if self.reason:
            return []
        if token.id in self._stop_ids or token.id in self._end_ids:
            return self._finish(STOP if token.id in self._stop_ids else END)
        self.n_tokens += 1
        self._held.append(Piece("" if token.id in self._ignored_ids else self._characters.push(token.id), token))
        n_certain, has_stopped = before_stop("".join(piece.text for piece in self._held), self._stops)
        if has_stopped:
            self.reason = STOP
            return self._release(n_certain, cut=True)
        if self.n_tokens == self.limit:
            return self._finish(self._at_limit)
        return self._release(n_certain)

    def _finish(self, reason: str) -> list[Piece]:
        self.reason = reason
        rest = self._characters.flush()
        return self._held + ([Piece(rest, None)] if rest else [])

    def _release(self, n: int, cut: bool = False) -> list[Piece]:
        """Return the held pieces within the first n characters, with ``cut`` also the beginning of the next."""
        pieces = []
        while self._held and len(self._held[0].text) <= n:
            n -= len(self._held[0].text)
            pieces.append(self._held.pop(0))
        if cut and n:
            pieces.append(self._held[0]._replace(text=self._held[0].text[:n]))
        return pieces


def before_stop(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    """Return how many characters precede a stop string, and True if it is complete.

    The stop string that is complete first counts or, if there is none, the longest that may have begun:
    ``before_stop("that's all fo", ["folks"])`` is (11, False).
    """
    ends = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if ends:
        return min(ends)[1], True
    begun = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    return len(text) - max(begun, default=0), False
