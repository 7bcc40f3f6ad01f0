"""One request and its answer over ASGI (asgi.readthedocs.io, HTTP connection scope)."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_gpt.serve.answer import DONE, as_json, event, new_answer
from mlx_gpt.serve.request import APIError
from mlx_gpt.serve.service import Job, Service

BODY_SECONDS = 20  # for receiving a request's body


class Exchange:
    """One request to ``/v1/completions`` and its answer; an ASGI app awaits it, like Starlette's ``HTTPEndpoint``."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send):
        self.service, self.scope, self.receive, self.send = service, scope, receive, send
        self.request = Request(scope, receive)
        self.is_streaming = False

    def __await__(self) -> Generator[Any, None, None]:
        return self.run().__await__()

    async def run(self) -> None:
        timeout = self.service.limits.timeout
        try:
            with suppress(ClientDisconnect), self.service.admitted(), anyio.fail_after(timeout):
                await self._answer()
        except APIError as error:
            await self._send_error(error)
        except TimeoutError:
            message = f"the request took longer than {timeout:g} seconds; ask for fewer tokens"
            await self._send_error(APIError(504, message))

    async def _answer(self) -> None:
        request = self.service.reader.read(await self._body())
        with self.service.job(request) as job:
            watcher = asyncio.create_task(self._watch(job))
            try:
                await (self._stream(job) if request.stream else self._whole(job))
            finally:
                watcher.cancel()

    async def _whole(self, job: Job) -> None:
        async for _ in job.changes():
            pass
        answer = new_answer(self.service.name) | {"choices": job.best(), "usage": job.usage()}
        await respond(200, answer)(self.scope, self.receive, self.send)

    async def _stream(self, job: Job) -> None:
        answer = new_answer(self.service.name)
        if job.request.include_usage:
            answer["usage"] = None  # until the last chunk
        await self.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
            }
        )
        self.is_streaming = True
        async for choice in job.changes():
            if choice.is_ready:
                await self._chunk(event(answer | {"choices": [choice.take()]}))
        if job.request.include_usage:
            await self._chunk(event(answer | {"choices": [], "usage": job.usage()}))
        await self._chunk(DONE, more=False)

    async def _chunk(self, data: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send_error(self, error: APIError) -> None:
        with anyio.move_on_after(1):  # the client may not be reading
            if self.is_streaming:
                await self._chunk(event(error.body), more=False)
            else:
                await respond(error.status, error.body, error.headers)(self.scope, self.receive, self.send)

    async def _body(self) -> bytes:
        """Return the request's body. One that is too long is read and dropped, so that the client reads the answer."""
        headers = self.request.headers
        if not headers.get("content-type", "").startswith("application/json"):
            raise APIError(415, "the body must be JSON, with the header content-type: application/json")
        limit = self.service.limits.max_body
        too_long = APIError(413, f"the body must have at most {limit} bytes; send fewer or shorter prompts")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit and headers.get("expect"):  # the client waits for 100 Continue
            raise too_long
        body = bytearray()
        size = 0
        with anyio.move_on_after(BODY_SECONDS) as deadline:
            async for part in self.request.stream():
                size += len(part)
                body += part if size <= limit else b""
        if size > limit:
            raise too_long
        if deadline.cancelled_caught:
            raise APIError(408, f"the body did not arrive within {BODY_SECONDS} seconds")
        return bytes(body)

    async def _watch(self, job: Job) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        job.events.put_nowait(ClientDisconnect())


def respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, media_type="application/json")
