"""All computing: MLX's streams and compiled steps belong to a thread, so one thread has the model to itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from mlx_gpt.generate.writer import Piece, Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.batch import Batch
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer


class Event(NamedTuple):
    """What has become of a row: pieces of its text; why it ended, if it has; or what went wrong instead."""

    row: Row
    pieces: list[Piece]
    reason: str | None = None
    error: str | None = None


class Engine:
    """Continues rows, the first come first, ``max_rows`` side by side. Tells ``deliver``, on its thread, what comes.

    One thread calls ``run``; any may ``submit`` rows, ``cancel`` them, and ``stop`` it.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        max_rows: int,
        deliver: Callable[[list[Event]], None],
        cache_bits: int | None = None,
    ):
        self._tokenizer, self._max_rows, self._deliver = tokenizer, max_rows, deliver
        self._new_batch = partial(Batch, model, tokenizer, cache_bits)
        self._news = threading.Condition()  # guards the two below
        self._waiting: list[Row] = []
        self._stopping = False

    def stop(self) -> None:
        """After the turn under way."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def submit(self, rows: Iterable[Row]) -> None:
        with self._news:
            self._waiting += rows
            self._news.notify()

    def cancel(self, rows: Iterable[Row]) -> None:
        """Make room: nobody wants these rows any more, whether they wait, are under way, or have ended."""
        for row in rows:
            row.cancelled = True
        with self._news:
            self._waiting = [row for row in self._waiting if not row.cancelled]

    def run(self) -> None:
        """Until it is stopped."""
        batch = self._new_batch()
        while (newcomers := self._next(batch)) is not None:
            try:
                self._deliver(list(self._turn(batch, newcomers)))
            except Exception as error:  # such as memory that does not suffice: the next request is served
                print(f"mlx-gpt: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                lost = dict.fromkeys([*batch.rows, *newcomers])
                batch = self._new_batch()
                self._deliver([Event(row, [], error="the model failed; the server's log says how") for row in lost])

    def _next(self, batch: Batch) -> list[Row] | None:
        """The rows that join for the next turn; waits for some where none is under way. None at the end."""
        with self._news:
            self._news.wait_for(lambda: self._stopping or self._waiting or batch.rows)
            if self._stopping:
                return None
            room = self._max_rows - len(batch.rows)
            newcomers, self._waiting = self._waiting[:room], self._waiting[room:]
            return newcomers

    def _turn(self, batch: Batch, newcomers: list[Row]) -> Iterable[Event]:
        batch.keep([row for row in batch.rows if not row.cancelled])
        for row in newcomers:
            if row.echo or not row.limit:
                yield Event(row, self._echo(batch.prompt_tokens(row)) if row.echo else [], row.reason)
        if beginning := [row for row in newcomers if row.limit]:
            batch.add(beginning)
        if batch.rows:
            for row, token in batch.turn():
                if not row.reason:
                    yield Event(row, row.push(token), row.reason)
            batch.keep([row for row in batch.rows if not row.reason])

    def _echo(self, tokens: list[Token]) -> list[Piece]:
        characters = self._tokenizer.stream()
        pieces = [Piece(characters.push(token.id), token) for token in tokens]
        rest = characters.flush()
        return [*pieces, Piece(rest, None)] if rest else pieces
