"""A request and its answer over ASGI (asgi.readthedocs.io, HTTP connection scope)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_gpt.serve.answer import DONE, as_json, event, new_answer
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.request import RequestReader
from mlx_gpt.serve.service import STOPPING, Job, Service


class Exchange:
    """A request with a JSON body and its answer; an ASGI app awaits it, like Starlette's ``HTTPEndpoint``."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send):
        self.service, self.scope, self.receive, self.send = service, scope, receive, send
        self.request = Request(scope, receive)
        self.is_streaming = False

    def __await__(self) -> Generator[Any, None, None]:
        return self.run().__await__()

    async def run(self) -> None:
        timeout = self.service.limits.timeout
        try:
            with suppress(ClientDisconnect), anyio.fail_after(timeout):
                self.service.check_room()
                body = await self._body()
                with self.service.admitted():
                    await self._answer(body)
        except APIError as error:
            await self._send_error(error)
        except TimeoutError:
            message = f"the request took longer than {timeout:g} seconds; ask for fewer tokens"
            await self._send_error(APIError(504, message))
        except asyncio.CancelledError:  # by the server, which is stopping
            await self._send_error(APIError(503, STOPPING))

    async def _answer(self, body: bytes) -> None:
        raise NotImplementedError

    async def _send_error(self, error: APIError) -> None:
        with anyio.move_on_after(1):  # the client may not be reading
            await respond(error.status, error.body, error.headers)(self.scope, self.receive, self.send)

    async def _body(self) -> bytes:
        """Return the request's body. The connection reads and drops the rest of one that is refused."""
        limits, headers, service = self.service.limits, self.request.headers, self.service
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise APIError(415, "the body must be JSON, with the header content-type: application/json")
        too_long = APIError(413, f"the body must have at most {limits.max_body} bytes; send fewer or shorter prompts")
        if int(headers.get("content-length", "0")) > limits.max_body:
            raise too_long
        body = bytearray()
        try:
            with anyio.fail_after(limits.receive_timeout):
                async for part in self.request.stream():
                    body += part
                    service.n_receiving += len(part)
                    if len(body) > limits.max_body:
                        raise too_long
                    if service.n_receiving > limits.max_requests * limits.max_body:
                        raise APIError(429, "too many requests are arriving; try again in a second")
        except TimeoutError:
            message = f"the body did not arrive within {limits.receive_timeout:g} seconds"
            raise APIError(408, message, headers={"connection": "close"}) from None
        finally:
            service.n_receiving -= len(body)
        return bytes(body)


class Completion(Exchange):
    """A request to ``/v1/completions`` and its answer."""

    async def _answer(self, body: bytes) -> None:
        request = await asyncio.to_thread(self.service.reader.read, body)
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
        if not self.is_streaming:
            await super()._send_error(error)
            return
        with anyio.move_on_after(1):
            await self._chunk(event(error.body), more=False)

    async def _watch(self, job: Job) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        job.events.put_nowait(ClientDisconnect())


class Conversion(Exchange):
    """A request that ``convert`` answers from its body alone."""

    def __init__(self, convert: Callable[[RequestReader, bytes], dict[str, Any]], service: Service, *asgi: Any):
        super().__init__(service, *asgi)
        self.convert = convert

    async def _answer(self, body: bytes) -> None:
        answer = await asyncio.to_thread(lambda: as_json(self.convert(self.service.reader, body)))
        await Response(answer, media_type="application/json")(self.scope, self.receive, self.send)


def respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(body), status, headers, media_type="application/json")
