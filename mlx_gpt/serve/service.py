"""A model and the requests to it: admission, jobs and shutdown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.answer import CompletionChoice
from mlx_gpt.serve.engine import Engine, Event
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.request import CompletionRequest, RequestReader
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer

STOPPING = "the server is stopping"


class Job:
    """A request in progress: its rows, their texts, and a queue of ``events``."""

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer, n_positions: int):
        self.request = request
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        prompts = [prompt for prompt in request.prompts for _ in range(request.best_of)]
        self.rows = [
            Row(tokenizer, n_positions, prompt, request.settings, request.seed, index, self, request.echo)
            for index, prompt in enumerate(prompts)
        ]
        self.choices = [CompletionChoice(row, request.logprobs, tokenizer) for row in self.rows]

    async def changes(self) -> AsyncIterator[CompletionChoice]:
        """Yield each text when it grows, until all have ended. Raises an error from the queue."""
        while not all(choice.reason for choice in self.choices):
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if event.error:
                raise event.error
            choice = self.choices[event.row.index]
            choice.add(event.pieces, event.reason)
            yield choice

    def best(self) -> list[dict[str, Any]]:
        """Return the best n texts of each prompt."""
        n, best_of = self.request.n, self.request.best_of
        groups = [self.choices[i : i + best_of] for i in range(0, len(self.choices), best_of)]
        if best_of > n:
            groups = [sorted(group, key=lambda choice: -choice.mean_logprob)[:n] for group in groups]
        chosen = [choice for group in groups for choice in group]
        return [choice.take() | {"index": index} for index, choice in enumerate(chosen)]

    def usage(self) -> dict[str, int]:
        n_prompt = sum(len(row.input) for row in self.rows[:: self.request.best_of])
        n_new = sum(row.n_tokens for row in self.rows)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


class Service:
    """A model and the requests to it. Everything except ``engine.run`` runs in the thread of the event loop."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits, cache_bits: int | None = None):
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.n_positions = model.config.n_positions
        self.reader = RequestReader(name, tokenizer, self.n_positions, limits)
        self.engine = Engine(model, tokenizer, limits.rows, self._deliver, cache_bits)
        self.created = int(time.time())
        self.n_requests = 0
        self.n_receiving = 0  # bytes of bodies that are arriving
        self.is_closing = False  # set when the server is to stop
        self._jobs: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Deliver the engine's events to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def check_room(self) -> None:
        """Raise ``APIError`` if no request can be admitted now."""
        if self.is_closing:
            raise APIError(503, STOPPING)
        if self.n_requests >= self.limits.max_requests:
            raise APIError(
                429, f"{self.n_requests} requests are waiting; try again in a second", None, "rate_limit_exceeded"
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request in progress, whose body has arrived; ``APIError`` if there are too many."""
        self.check_room()
        self.n_requests += 1
        try:
            yield
        finally:
            self.n_requests -= 1

    @contextmanager
    def job(self, request: CompletionRequest) -> Iterator[Job]:
        """Start a job; on exit cancel its rows that have not ended."""
        job = Job(request, self.tokenizer, self.n_positions)
        self._jobs.add(job)
        self.engine.submit(job.rows)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            self.engine.cancel(job.rows)

    def _deliver(self, events: list[Event]) -> None:
        assert self._loop
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if event.row.owner in self._jobs:
                event.row.owner.events.put_nowait(event)
