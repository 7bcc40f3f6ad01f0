"""The server process: a socket, uvicorn, and a shutdown that answers every request."""

from __future__ import annotations

import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from mlx_gpt.errors import UsageError
from mlx_gpt.serve.app import make_app
from mlx_gpt.serve.service import Service

FILES = 4096  # open files, one per connection; the default of macOS is 256


class Server(uvicorn.Server):
    """Uvicorn's server, which prints its address when it is ready and stops its service on a signal."""

    def __init__(self, service: Service, sock: socket.socket):
        seconds = int(service.limits.grace) + 5  # for clients that do not read the service's answer
        super().__init__(
            uvicorn.Config(
                make_app(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=seconds,
            )
        )
        self._service, self._socket = service, sock

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self._socket.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        print(f"mlx-gpt: {self._service.name} at {url}; Ctrl-C stops it", file=sys.stderr, flush=True)

    def run_until_stopped(self) -> None:
        try:
            self.run([self._socket])
        finally:
            self._service.engine.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._service.stop()


def serve(service: Service, sock: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish those in progress. Call it in the main thread.

    The main thread computes and a second one serves HTTP: a thread that has used MLX should end with its process.
    """
    allow_files(FILES)
    server = Server(service, sock)
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.run_until_stopped, name="http")
    thread.start()
    try:
        service.engine.run()
    finally:
        server.should_exit = True
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address, at any free port for port 0. Raises ``UsageError``."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port must be from 0 (any free port) to 65535, not {port}")
    try:
        family, _, _, _, location = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(location[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot serve at {host} port {port}: {error}; choose another --host or --port") from error


def allow_files(n: int) -> None:
    """Raise the limit of open files to n, or as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
