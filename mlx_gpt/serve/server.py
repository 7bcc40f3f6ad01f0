"""The server process: a socket, uvicorn, and a shutdown that answers every request."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn

from mlx_gpt.errors import UsageError
from mlx_gpt.serve.app import make_app
from mlx_gpt.serve.connection import Connection
from mlx_gpt.serve.guard import Guard
from mlx_gpt.serve.log import log_to_stderr
from mlx_gpt.serve.service import Service

BACKLOG = 2048  # connections that the system holds until they are accepted
FAREWELL = 2.0  # seconds for interrupted clients to read that they are
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ACCEPTED = 32  # at a time, before their number is compared with the limit
OTHER_FILES = ACCEPTED + 64  # open files that are not connections


class Server(uvicorn.Server):
    """Uvicorn's server, which prints its address when it is ready and stops its service on a signal."""

    def __init__(self, service: Service, guard: Guard, sock: socket.socket):
        limits = service.limits
        n = min(limits.max_connections, allow_files(limits.max_connections + OTHER_FILES) - OTHER_FILES)
        super().__init__(
            uvicorn.Config(
                make_app(service, guard),
                loop="asyncio",
                http=partial(Connection, max(n, ACCEPTED), limits.receive_timeout),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                backlog=ACCEPTED,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(limits.grace) + 5,  # for clients that do not read the service's answer
            )
        )
        self._service, self._socket = service, sock
        self._loop: asyncio.AbstractEventLoop
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._is_interrupted = False

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._signals, self._stop)
        await super().startup(sockets)
        self._socket.listen(BACKLOG)  # uvicorn has set it to the number accepted at a time
        host, port = self._socket.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        print(f"mlx-gpt: {self._service.name} at {url}; Ctrl-C stops it", file=sys.stderr, flush=True)

    def run_until_stopped(self) -> None:
        try:
            self.run([self._socket])
        finally:
            self._service.engine.stop()

    def catch_signals(self) -> None:
        """Handle signals in the event loop from now on: the main thread, which calls this, may compute for seconds."""
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda *_: None)

    def _stop(self) -> None:
        """Let requests in progress finish within the grace period; at a second signal interrupt them at once."""
        for number in self._signals.recv(4096):
            if number in SIGNALS:
                is_second, self.should_exit = self.should_exit, True
                self._service.is_closing = True
                self._loop.call_later(0.0 if is_second else self._service.limits.grace, self._interrupt)

    def _interrupt(self) -> None:
        """Cancel the requests in progress, which are then answered 503."""
        if not self._is_interrupted:
            self._is_interrupted = True
            for task in self.server_state.tasks:
                task.cancel()
            self._loop.call_later(FAREWELL, self._abort)

    def _abort(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()


def serve(service: Service, guard: Guard, sock: socket.socket) -> None:
    """Answer requests until SIGINT, SIGTERM or SIGHUP, then finish those in progress.

    The main thread computes and a second one serves HTTP: a thread that has used MLX should end with its process.
    Call it last: afterwards the signals are ignored.
    """
    log_to_stderr()
    server = Server(service, guard, sock)
    server.catch_signals()
    thread = threading.Thread(target=server.run_until_stopped, name="http")
    thread.start()
    try:
        service.engine.run()
    finally:
        server.should_exit = True
        thread.join()
        for number in SIGNALS:  # the process ends: one more signal is not to interrupt that
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address, at any free port for port 0. Raises ``UsageError``."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port must be from 0 (any free port) to 65535, not {port}")
    try:
        family, _, _, _, location = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(location[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot serve at {host} port {port}: {error}; choose another --host or --port") from error


def allow_files(n: int) -> int:
    """Raise the limit of open files to n if it is lower, as far as the system allows, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= n:
        return n
    with suppress(ValueError, OSError):
        limit = n if hard == resource.RLIM_INFINITY else min(n, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return soft
