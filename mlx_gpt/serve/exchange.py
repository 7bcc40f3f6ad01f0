"""One request and its answer, over ASGI (asgi.readthedocs.io, HTTP connection scope)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_gpt.serve.answer import DONE, Head, as_json, event
from mlx_gpt.serve.request import APIError
from mlx_gpt.serve.service import Job, Service

BODY_SECONDS = 20  # in which a request's body must have come


class HungUp(Exception):
    """The client is gone; nobody waits for an answer."""


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


def respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, media_type="application/json")
