"""The HTTP side, an ASGI app: who comes in, what is answered, and when to give up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.answer import DONE, Choice, Head, as_json, event, usage
from mlx_gpt.serve.engine import Engine, Event
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.request import APIError, Asked, Reader
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer

BODY_SECONDS = 20  # in which a request's body must have come
NO_CHAT = (
    "GPT-2 is no chat model: it continues texts and was not trained to answer. Send the text to be continued to "
    "/v1/completions (client.completions.create)"
)


class HungUp(Exception):
    """The client is gone; nobody waits for an answer."""


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
        self.choices = [Choice(row, row.index, asked.logprobs, tokenizer) for row in self.rows]

    async def changes(self) -> AsyncIterator[Choice]:
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
        return usage(sum(len(row.read) for row in prompts), sum(row.n_said for row in self.rows))


class Service:
    """A model, and the requests to it. All but ``engine.run`` belongs to the thread of the event loop."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits):
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.n_positions = model.config.n_positions
        self.reader = Reader(name, tokenizer, self.n_positions, limits)
        self.engine = Engine(model, tokenizer, limits.rows, self._deliver)
        self.created = int(time.time())
        self.n_requests = 0
        self.is_closing = False
        self._jobs: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        yield

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


class Exchange:
    """One request to ``/v1/completions`` and its answer."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send):
        self.service, self.scope, self.receive, self.send = service, scope, receive, send
        self.headers = Headers(scope=scope)
        self.is_streaming = False

    async def run(self) -> None:
        timeout = self.service.limits.timeout
        try:
            with self.service.admitted(), anyio.fail_after(timeout):
                await self._answer()
        except HungUp:
            pass
        except APIError as error:
            await self._tell(error)
        except TimeoutError:
            await self._tell(APIError(504, f"this took longer than {timeout:g} seconds; ask for fewer tokens"))

    async def _answer(self) -> None:
        asked = self.service.reader.read(await self._body())
        with self.service.under_way(asked) as job:
            watcher = asyncio.create_task(self._watch(job))
            try:
                await (self._stream(job) if asked.stream else self._whole(job))
            finally:
                watcher.cancel()

    async def _whole(self, job: Job) -> None:
        async for _ in job.changes():
            pass
        await self._respond(200, Head(self.service.name).part(job.best(), usage=job.usage()))

    async def _stream(self, job: Job) -> None:
        head = Head(self.service.name)
        no_usage: dict[str, Any] = {"usage": None} if job.asked.include_usage else {}
        await self.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
            }
        )
        self.is_streaming = True
        async for choice in job.changes():
            if choice.has_news:
                await self._chunk(event(head.part([choice.take()], **no_usage)))
        if job.asked.include_usage:
            await self._chunk(event(head.part([], usage=job.usage())))
        await self._chunk(DONE, more=False)

    async def _chunk(self, data: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _tell(self, error: APIError) -> None:
        with anyio.move_on_after(1):  # nobody may be reading
            if self.is_streaming:
                await self._chunk(event(error.body), more=False)
            else:
                await self._respond(error.status, error.body, error.headers)

    async def _respond(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        await respond(status, body, headers)(self.scope, self.receive, self.send)

    async def _body(self) -> bytes:
        """The request's body. One that is too long is read to its end and thrown away, so that its sender listens."""
        if not self.headers.get("content-type", "").startswith("application/json"):
            raise APIError(415, "the body must be JSON, and the header say so: content-type: application/json")
        limit = self.service.limits.max_body
        too_long = APIError(413, f"a body may have {limit} bytes at most; send fewer or shorter prompts")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit and self.headers.get("expect"):  # it asks before it sends
            raise too_long
        body = bytearray()
        size = 0
        with anyio.move_on_after(BODY_SECONDS) as deadline:
            async for part in self._parts():
                size += len(part)
                body += part if size <= limit else b""
        if size > limit:
            raise too_long
        if deadline.cancelled_caught:
            raise APIError(408, f"the body did not come within {BODY_SECONDS} seconds")
        return bytes(body)

    async def _parts(self) -> AsyncIterator[bytes]:
        while (message := await self.receive())["type"] == "http.request":
            yield message.get("body", b"")
            if not message.get("more_body"):
                return
        raise HungUp

    async def _watch(self, job: Job) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        job.news.put_nowait(HungUp())


class Completions:
    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange(self.service, scope, receive, send).run()


def make_app(service: Service) -> Starlette:
    """The ASGI app."""
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "mlx_gpt"}

    async def health(_: Request) -> Response:
        state = "stopping" if service.is_closing else "ok"
        return respond(200 if state == "ok" else 503, {"status": state, "requests": service.n_requests})

    async def models(_: Request) -> Response:
        return respond(200, {"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        service.reader.check_name(request.path_params["name"])
        return respond(200, model)

    async def chat(_: Request) -> Response:
        raise APIError(404, NO_CHAT, "model", "model_not_supported")

    routes = [
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["GET", "POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
    ]
    handlers = {APIError: api_error, HTTPException: http_error, Exception: own_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=service.lifespan)


def respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, media_type="application/json")


async def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return respond(error.status, error.body, error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    paths = "POST /v1/completions, GET /v1/models, GET /health"
    refused = APIError(error.status_code, f"there is no {request.method} {request.url.path[:60]} here, only {paths}")
    return respond(error.status_code, refused.body, error.headers)


async def own_error(_: Request, error: Exception) -> Response:
    return respond(500, APIError(500, "the server made a mistake; its log says which").body)
