"""The ASGI app: routes, access and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import mlx.core as mx
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_gpt.serve.exchange import Completion, Conversion, respond
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.guard import Guard
from mlx_gpt.serve.service import Service
from mlx_gpt.serve.tokenization import detokenize, tokenize

NO_CHAT = (
    "GPT-2 is not a chat model: it continues texts and was not trained to answer. Send the text to continue to "
    "/v1/completions (client.completions.create)"
)


class Checked:
    """An ASGI app that is asked only if ``check`` of the request does not raise ``APIError``."""

    def __init__(self, app: ASGIApp, check: Callable[[Scope], None]):
        self.app, self.check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        try:
            if scope["type"] == "http":
                self.check(scope)
        except APIError as error:
            app = respond(error.status, error.body, error.headers)
        await app(scope, receive, send)


def make_app(service: Service, guard: Guard) -> ASGIApp:
    """Return the ASGI app. What web pages may read, its errors too, passes through the CORS headers."""
    app: ASGIApp = Checked(make_routes(service), guard.check_key)
    if guard.origins:
        app = CORSMiddleware(
            app,
            allow_origins=guard.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["retry-after"],
        )

    def check(scope: Scope) -> None:
        headers = Headers(scope=scope)
        guard.check_site(headers)
        if "content-length" in headers and "transfer-encoding" in headers:  # RFC 9112, section 6.1
            message = "a request has content-length or transfer-encoding, not both"
            raise APIError(400, message, headers={"connection": "close"})

    return Checked(app, check)


def make_routes(service: Service) -> Starlette:
    """Return the app of the endpoints."""
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "mlx_gpt"}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.open()
        yield

    async def health(_: Request) -> Response:
        state = "stopping" if service.is_closing else "ok"
        memory = {
            "active": mx.get_active_memory(),
            "freed": mx.get_cache_memory(),
            "peak": mx.get_peak_memory(),
        }  # bytes
        found = {"status": state, "requests": service.n_requests, "memory_bytes": memory}
        return respond(200 if state == "ok" else 503, found)

    async def models(_: Request) -> Response:
        return respond(200, {"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        service.reader.check_name(request.path_params["name"])
        return respond(200, model)

    async def chat(_: Request) -> Response:
        raise APIError(404, NO_CHAT, "model", "model_not_supported")

    routes = [
        Route("/v1/completions", partial(Completion, service), methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["GET", "POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/tokenize", partial(Conversion, tokenize, service), methods=["POST"]),
        Route("/detokenize", partial(Conversion, detokenize, service), methods=["POST"]),
        Route("/health", health),
    ]
    handlers = {APIError: api_error, HTTPException: http_error, Exception: internal_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return respond(error.status, error.body, error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """Answer an error of Starlette: an unknown path or method."""
    assert isinstance(error, HTTPException)
    paths = "POST /v1/completions, /tokenize and /detokenize, GET /v1/models and /health"
    refused = APIError(error.status_code, f"there is no {request.method} {request.url.path[:60]} here, only {paths}")
    return respond(error.status_code, refused.body, error.headers)


async def internal_error(_: Request, error: Exception) -> Response:
    return respond(500, APIError(500, "internal error; see the server's log").body)
