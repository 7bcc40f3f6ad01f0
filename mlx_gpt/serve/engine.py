"""The thread that computes: MLX's streams and compiled steps belong to one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from mlx_gpt.device import first_reported
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.decoder import NO_TOKEN
from mlx_gpt.generate.sampler import no_token_error
from mlx_gpt.generate.writer import Piece, Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.batch import Batch
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.log import LOG
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer


class Event(NamedTuple):
    """New pieces of a row's text, the reason if it ended, or an error to answer."""

    row: Row
    pieces: list[Piece]
    reason: str | None = None
    error: APIError | None = None


class Engine:
    """Continues rows in the order of their arrival, at most ``max_rows`` in a batch, and calls ``deliver`` with events.

    One thread calls ``run``, which calls ``deliver``; any thread may call ``submit``, ``cancel`` and ``stop``.
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
        self._changed = threading.Condition()  # guards the two below
        self._waiting: list[Row] = []
        self._stopping = False

    def stop(self) -> None:
        """Stop after the current turn."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def submit(self, rows: Iterable[Row]) -> None:
        with self._changed:
            self._waiting += rows
            self._changed.notify()

    def cancel(self, rows: Iterable[Row]) -> None:
        """Drop rows, whether they wait, are being computed or have ended."""
        for row in rows:
            row.cancelled = True
        with self._changed:
            self._waiting = [row for row in self._waiting if not row.cancelled]

    def run(self) -> None:
        """Compute until ``stop`` is called."""
        batch = self._new_batch()
        while (newcomers := self._next(batch)) is not None:
            try:
                with first_reported("prompt" if newcomers else "token"):
                    events = list(self._turn(batch, newcomers))
                self._deliver(events)
            except Exception as error:  # such as too little memory: the next request is served
                LOG.error(f"{type(error).__name__}: {error}")
                lost = dict.fromkeys([*batch.rows, *newcomers])
                batch = self._new_batch()
                self._deliver(
                    [Event(row, [], error=APIError(500, "the model failed; see the server's log")) for row in lost]
                )

    def _next(self, batch: Batch) -> list[Row] | None:
        """Return the rows that join at the next turn, waiting for some if the batch is empty; None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or batch.rows)
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
                if not row.reason and not row.cancelled:
                    yield self._event(row, token)
            batch.keep([row for row in batch.rows if not row.reason])

    def _event(self, row: Row, token: Token) -> Event:
        if token.id != NO_TOKEN:
            return Event(row, row.push(token), row.reason)
        row.cancelled = True  # the other rows go on
        error = no_token_error([row.settings])
        return Event(row, [], error=APIError(400 if isinstance(error, UsageError) else 500, str(error)))

    def _echo(self, tokens: list[Token]) -> list[Piece]:
        characters = self._tokenizer.stream()
        pieces = [Piece(characters.push(token.id), token) for token in tokens]
        rest = characters.flush()
        return [*pieces, Piece(rest, None)] if rest else pieces
