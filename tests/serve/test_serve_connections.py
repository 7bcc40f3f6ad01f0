"""Slow, idle, malformed and refused clients: each gets one clean answer, and none keeps others from theirs."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.server import Client, head, serving, status

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

REQUEST = b'{"prompt": "x", "max_tokens": 2}'
GOOD = head(len(REQUEST), "connection: close") + REQUEST
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED += b"transfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Client]:
    with serving(folder, "--receive-timeout", "0.4", "--max-connections", "40", "--max-body", "100000") as client:
        yield client


def log_of(server: Client) -> str:
    server.process.send_signal(signal.SIGTERM)
    return server.process.communicate(timeout=20)[1]


MALFORMED = {
    "a bad chunk": (CHUNKED + b"\r\nzz\r\nabc\r\n", 400),
    "a bad chunk after a good one": (CHUNKED + b"\r\n1\r\n{\r\nzz\r\n", 400),
    "a chunk of negative size": (CHUNKED + b"\r\n-5\r\nabc\r\n", 400),
    "a bad content-length": (head(0).replace(b"length: 0", b"length: abc") + REQUEST, 400),
    "two lengths": (head(5, "content-length: 6") + REQUEST, 400),
    "length and chunks": (CHUNKED + b"content-length: 5\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", 400),
    "an unknown transfer coding": (CHUNKED.replace(b"chunked", b"gzip") + b"\r\n" + REQUEST, 501),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", 400),
    "a long head": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 300_000, 431),
}


@pytest.mark.parametrize(("sent", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_has_one_answer_in_the_format_of_errors(server: Client, sent: bytes, expected: int) -> None:
    answer = server.send(sent)
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1 ") == 1
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


def test_valid_but_rare_requests_are_answered(server: Client) -> None:
    chunks = b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(REQUEST), REQUEST)
    assert status(server.send(CHUNKED + CLOSE.rstrip() + b"\r\n" + chunks)) == 200
    assert status(server.send(GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"))) == 200
    assert status(server.send(b"GET /health HTTP/1.0\r\n\r\n")) == 200
    assert server.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2 + GOOD).count(b" 200 OK") == 3
    waiting = server.send(head(len(REQUEST), "expect: 100-continue", "connection: close"), REQUEST, pause=0.05)
    assert waiting.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200 OK" in waiting
    upgrade = b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n\r\n"
    assert status(server.send(upgrade)) == 200


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("/v1/completions", "text/plain", 415),
        ("/v1/completions", "application/json", 413),
        ("/v1/models", "application/json", 405),
        ("/v1/embeddings", "application/json", 404),
    ],
)
def test_a_refusal_reaches_a_client_that_is_still_sending(
    server: Client, path: str, kind: str, expected: int, connection: str
) -> None:
    body = b"a" * 3_000_000
    first = head(len(body), f"connection: {connection}", path=path).replace(b"application/json", kind.encode())
    answer = server.send(first, body[:1000], body[1000:], GOOD if connection == "keep-alive" else b"", pause=0.05)
    assert status(answer) == expected
    assert (b"HTTP/1.1 200 OK" in answer) is (connection == "keep-alive")  # the connection can be used again


def test_a_bad_chunk_after_a_refusal_closes_the_connection(server: Client) -> None:
    refused = CHUNKED.replace(b"POST /v1/completions", b"PUT /health") + b"\r\n1\r\na\r\n"
    assert server.send(refused, b"zz\r\n", pause=0.1).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("first", "byte", "expected"),
    [
        (b"GET /hea", b"a", 408),
        (head(100), b" ", 408),
        (CHUNKED + b"\r\n", b"1\r\n \r\n", 408),
        (head(100, path="/nothing"), b" ", 404),
        (b"", b"", 0),
    ],
    ids=["head", "body", "chunks", "refused body", "nothing"],
)
def test_a_slow_client_is_answered_and_closed(server: Client, first: bytes, byte: bytes, expected: int) -> None:
    begin = time.monotonic()
    answer = server.send(first, *[byte] * 18, pause=0.05)
    assert (status(answer) if answer else 0) == expected
    assert time.monotonic() - begin < 4


def test_a_request_cut_off_by_its_client_is_refused(server: Client) -> None:
    for part in (b"GET /hea", head(100) + b"{"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            assert status(connection.recv(1000)) == 400


@pytest.mark.parametrize("sent", [b"", b"G", head(100) + b"{", GOOD[:-1], b"GET /health HTTP/1.1\r\nhost: ::1\r\n\r\n"])
def test_more_idle_connections_than_allowed_are_closed_for_new_ones(server: Client, sent: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(120):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            connection.sendall(sent)
        assert server.complete(max_tokens=2).status == 200


def test_the_log_of_all_these_is_a_few_lines(folder: Path) -> None:
    with serving(folder, "--max-connections", "32") as server:
        for _ in range(50):
            server.send(b"\0\r\n\r\n")
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            assert server.complete(max_tokens=1).status == 200
        lines = log_of(server).splitlines()
    assert len(lines) <= 3
    assert all(line.startswith("mlx-gpt: ") for line in lines)


def test_few_open_files_lower_the_number_of_connections(folder: Path) -> None:
    """The limit of a shell on macOS is 256; here it cannot be raised."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); " \
           "from mlx_gpt.cli import main; sys.exit(main(sys.argv[1:]))"  # fmt: skip
    with serving(folder, start=[sys.executable, "-c", code]) as server:
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            assert server.complete(max_tokens=1).status == 200
        assert log_of(server).count("\n") <= 2


def test_a_second_interrupt_answers_503_and_leaves_no_traceback(folder: Path) -> None:
    endless = json.dumps({"prompt": "ab", "n": 8, "max_tokens": 2000, "ignore_eos": True}).encode()
    with serving(folder) as server:
        answers: list[bytes] = []
        sent = (head(len(endless)) + endless, head(100) + b"{")
        threads = [threading.Thread(target=lambda part=part: answers.append(server.send(part))) for part in sent]
        for thread in threads:
            thread.start()
        while server.get("/health").body["requests"] < 1:
            time.sleep(0.01)
        time.sleep(0.1)
        begin = time.monotonic()
        while server.process.poll() is None:  # a busy system may deliver two signals as one
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert server.process.returncode == 0
        assert time.monotonic() - begin < 9  # the grace period is 10 s
        for thread in threads:
            thread.join()
        assert [status(answer) for answer in answers] == [503, 503]
        assert server.process.stderr
        assert server.process.stderr.read() == ""


def test_a_closed_terminal_does_not_stop_the_answers(folder: Path) -> None:
    with serving(folder) as server:
        assert server.process.stderr
        server.process.stderr.close()
        server.send(b"\0\r\n\r\n")  # is logged
        assert server.complete(max_tokens=2).status == 200
        server.process.terminate()
        assert server.process.wait(20) == 0
