"""The ASGI app: routes and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_gpt.serve.exchange import Exchange, respond
from mlx_gpt.serve.request import APIError
from mlx_gpt.serve.service import Service

NO_CHAT = (
    "GPT-2 is not a chat model: it continues texts and was not trained to answer. Send the text to continue to "
    "/v1/completions (client.completions.create)"
)


def make_app(service: Service) -> Starlette:
    """Return the ASGI app."""
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "mlx_gpt"}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.open()
        yield

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
        Route("/v1/completions", partial(Exchange, service), methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["GET", "POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
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
    paths = "POST /v1/completions, GET /v1/models, GET /health"
    refused = APIError(error.status_code, f"there is no {request.method} {request.url.path[:60]} here, only {paths}")
    return respond(error.status_code, refused.body, error.headers)


async def internal_error(_: Request, error: Exception) -> Response:
    return respond(500, APIError(500, "internal error; see the server's log").body)
