"""One connection: uvicorn's HTTP/1.1 protocol with limits on slow, idle and malformed clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mlx_gpt.serve.answer import as_json
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.log import LOG

LINGER = 10.0  # seconds for a client to finish sending or reading after the server has closed the connection


class Connection(H11Protocol):
    """A connection whose requests must each begin, with a complete head, within ``seconds``.

    At most ``max_connections`` are open. For one more, the connection that has waited longest for a complete request is
    closed; if all have one in progress, the new connection is answered 503.
    """

    def __init__(self, max_connections: int, seconds: float, **uvicorns: Any):
        super().__init__(**uvicorns)
        self._max_connections, self._seconds = max_connections, seconds
        self._timer: asyncio.TimerHandle | None = None  # until the head of a request is complete
        self._idle_since: float | None = None  # None while a complete request is in progress

    def connection_made(self, transport: Any) -> None:
        is_full = len(self.connections) >= self._max_connections
        self._lingering = LingeringTransport(transport, self.loop, self._is_receiving)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        if is_full:
            self._make_room()
        self._idle_since = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._lingering.stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # else it is the rest of a refused request
            super().data_received(data)
            self._watch()

    def eof_received(self) -> None:
        if self._idle_since is not None and self._is_receiving():
            self._refuse(400, "the client closed the connection in the middle of its request")

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()  # may begin the next request, if it has been sent already
        if self._has_head():
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse an invalid request; uvicorn calls this where it catches h11's error."""
        error = sys.exc_info()[1]
        reason = str(error or msg).partition(": bytearray")[0]  # without what the client sent
        self._refuse(getattr(error, "error_status_hint", 400), f"invalid HTTP request: {reason}")

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        else:
            super().shutdown()

    def _should_upgrade(self) -> bool:
        return False  # there is no WebSocket here; uvicorn would log advice to install one

    def _has_head(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_receiving(self) -> bool:
        """Return True if the client may still be sending a request."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    def _watch(self) -> None:
        """Limit the time until the head of a request is complete."""
        if self._has_head():
            self._stop_timer()
            if not self.cycle.more_body:
                self._idle_since = None
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._seconds, self._stop_waiting)

    def _stop_waiting(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not arrive within {self._seconds:g} seconds")
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _make_room(self) -> None:
        LOG.warning("%d connections are open, the most allowed: idle ones are closed", self._max_connections)
        idle = [other for other in self.connections if isinstance(other, Connection) and other._idle_since is not None]
        if not idle:
            self._refuse(503, "all connections have requests in progress; try again in a second")
            return
        oldest = min(idle, key=lambda other: other._idle_since or 0.0)
        oldest._idle_since = None
        oldest.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in the API's format, unless an answer has begun, and close the connection."""
        self._stop_timer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = as_json(APIError(status, message).body)
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = h11.Response(status_code=status, headers=[*headers.items()], reason=STATUS_PHRASES[status])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle:  # its body was invalid
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class LingeringTransport:
    """A transport whose ``close`` lets the client read its answer first.

    A socket that is closed with unread input resets the connection, and the client may lose the answer (RFC 9112,
    section 9.6). So while ``is_receiving()``, only the sending side is closed; the input is read until the client
    closes its side, and dropped by ``Connection``. After ``LINGER`` seconds the connection is reset, whether or not
    the client has finished.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, is_receiving: Callable[[], bool]):
        self._transport, self._loop, self._is_receiving = transport, loop, is_receiving
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._timer is not None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        self._timer = self._loop.call_later(LINGER, self._transport.abort)
        if not self._is_receiving():
            self._transport.close()
            return
        self._transport.resume_reading()
        with suppress(OSError):  # the client has closed the connection
            self._transport.write_eof()

    def stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
