"""A server in its own process on loopback, and a client for it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from helpers.command_line import environment


class Answer:
    """A status and its body: JSON, or the events of a stream."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status, self.headers = response.status, response.headers
        text = response.read().decode()
        self.events: list[Any] = []
        self.body: Any = None
        if "event-stream" in self.headers["content-type"]:
            parts = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
            self.is_done = parts[-1] == "[DONE]"
            self.events = [json.loads(part) for part in parts if part != "[DONE]"]
        else:
            self.body = json.loads(text)

    @property
    def error(self) -> Any:
        return self.body["error"]

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for choice in self.body["choices"]]


class Client:
    """Sends requests to a server, each over a new connection."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.port = process, port

    def get(self, path: str) -> Answer:
        return self.ask(path, None, "GET")

    def complete(self, prompt: Any = "ab", **fields: Any) -> Answer:
        return self.ask("/v1/completions", json.dumps({"prompt": prompt} | fields).encode())

    def ask(self, path: str, body: Any, method: str = "POST", kind: str = "application/json") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": kind})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def stream(self, **fields: Any) -> http.client.HTTPResponse:
        """Start a stream and return its response once the first byte has arrived."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"prompt": "ab", "stream": True} | fields)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.fp.peek(1)  # type: ignore[attr-defined]
        return response

    def send(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """Send raw bytes, with a pause before each further part, and return what arrives until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(parts[0])
            with suppress(BrokenPipeError, ConnectionResetError):  # the server may close while parts are sent
                for part in parts[1:]:
                    time.sleep(pause)
                    connection.sendall(part)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 30
        while self.get("/health").body["requests"]:
            assert time.monotonic() < end, "requests are still in progress"
            time.sleep(0.02)


def head(length: int, *headers: str, path: str = "/v1/completions", host: str = "127.0.0.1") -> bytes:
    """Return the head of a request with a body of this length."""
    more = (f"host: {host}", "content-type: application/json", f"content-length: {length}", *headers)
    return "\r\n".join([f"POST {path} HTTP/1.1", *more, "", ""]).encode()


def status(answer: bytes) -> int:
    """Return the status of the first answer in what a server sent."""
    return int(answer.split(b" ", 2)[1])


@contextmanager
def serving(folder: Path, *flags: str, start: Sequence[str] = (sys.executable, "-m", "mlx_gpt")) -> Iterator[Client]:
    """Serve a model folder in a new process at a free port; ``start`` is the command mlx-gpt."""
    command = [*start, "serve", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=folder.parent)
    try:
        assert process.stderr
        line = process.stderr.readline()
        found = re.fullmatch(rf"mlx-gpt: {folder.name} at http://127\.0\.0\.1:(\d+)/v1; Ctrl-C stops it\n", line)
        assert found, line + process.stderr.read()
        yield Client(process, int(found[1]))
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
