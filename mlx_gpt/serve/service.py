"""A model and the requests to it: who is let in, what each waits for, and when to tell all that it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.answer import CompletionChoice, usage
from mlx_gpt.serve.engine import Engine, Event
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.request import APIError, Asked, Reader
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer


class Job:
    """A request under way: its texts, and what becomes of them, in ``news``."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, n_positions: int):
        self.asked = asked
        self.news: asyncio.Queue[Event | Exception] = asyncio.Queue()
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.best_of)]
        self.rows = [
            Row(tokenizer, n_positions, prompt, asked.settings, asked.seed, index, self, asked.echo)
            for index, prompt in enumerate(prompts)
        ]
        self.choices = [CompletionChoice(row, row.index, asked.logprobs, tokenizer) for row in self.rows]

    async def changes(self) -> AsyncIterator[CompletionChoice]:
        """The texts as they grow, until all have ended. Raises what keeps them from it."""
        while not all(choice.reason for choice in self.choices):
            news = await self.news.get()
            if isinstance(news, Exception):
                raise news
            if news.error:
                raise APIError(500, news.error)
            choice = self.choices[news.row.index]
            choice.add(news.pieces, news.reason)
            yield choice

    def best(self) -> list[dict[str, Any]]:
        """The best n of each prompt's texts."""
        n, best_of = self.asked.n, self.asked.best_of
        groups = [self.choices[i : i + best_of] for i in range(0, len(self.choices), best_of)]
        if best_of > n:
            groups = [sorted(group, key=lambda choice: -choice.mean_logprob)[:n] for group in groups]
        chosen = [choice for group in groups for choice in group]
        return [choice.take() | {"index": index} for index, choice in enumerate(chosen)]

    def usage(self) -> dict[str, int]:
        prompts = self.rows[:: self.asked.best_of]
        return usage(sum(len(row.input) for row in prompts), sum(row.n_tokens for row in self.rows))


class Service:
    """A model, and the requests to it. All but ``engine.run`` belongs to the thread of the event loop."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits, cache_bits: int | None = None):
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.n_positions = model.config.n_positions
        self.reader = Reader(name, tokenizer, self.n_positions, limits)
        self.engine = Engine(model, tokenizer, limits.rows, self._deliver, cache_bits)
        self.created = int(time.time())
        self.n_requests = 0
        self.is_closing = False
        self._jobs: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """From here on the running event loop takes what the engine brings."""
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Room for a request; ``APIError`` where there is none."""
        if self.is_closing:
            raise APIError(503, "the server is being stopped")
        if self.n_requests >= self.limits.max_requests:
            raise APIError(
                429, f"{self.n_requests} requests wait already; try again in a second", None, "rate_limit_exceeded"
            )
        self.n_requests += 1
        try:
            yield
        finally:
            self.n_requests -= 1

    @contextmanager
    def under_way(self, asked: Asked) -> Iterator[Job]:
        """A job at work; when it is left, its rows make room, whether they have ended or not."""
        job = Job(asked, self.tokenizer, self.n_positions)
        self._jobs.add(job)
        self.engine.submit(job.rows)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            self.engine.cancel(job.rows)

    def stop(self) -> None:
        """Take nothing new, and in a while tell those that wait. May be called from a signal handler."""
        if self._loop and not self.is_closing:
            self.is_closing = True
            self._loop.call_soon_threadsafe(self._loop.call_later, self.limits.grace, self._tell_all)

    def _tell_all(self) -> None:
        for job in self._jobs:
            job.news.put_nowait(APIError(503, "the server is being stopped"))

    def _deliver(self, events: list[Event]) -> None:
        assert self._loop
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[Event]) -> None:
        for news in events:
            if news.row.owner in self._jobs:
                news.row.owner.news.put_nowait(news)
