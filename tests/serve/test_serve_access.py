"""Who may use a server: keys, hosts, and the web pages of other origins."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import the_line
from helpers.server import Client, head, serving, status

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

from starlette.datastructures import Headers

from mlx_gpt.cli import main
from mlx_gpt.errors import UsageError
from mlx_gpt.serve.access import Access
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.guard import Guard

KEY = "s3cret"
PAGE = "https://app.example"
REQUEST = b'{"prompt": "x", "max_tokens": 2}'


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Client]:
    with serving(folder, "--api-key", KEY, "--cors", PAGE + ":443/", "--cors", "null") as client:
        yield client


def allows(guard: Guard, host: str, *origins: str) -> bool:
    try:
        guard.check_site(Headers(raw=[(b"host", host.encode()), *((b"origin", origin.encode()) for origin in origins)]))
    except APIError:
        return False
    return True


# Hosts and origins


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1", "192.168.1.4"])
def test_requests_to_an_address_or_to_a_name_of_this_machine_are_allowed(host: str) -> None:
    guard = Guard(Access(), host)
    machine = socket.gethostname()
    names = ["localhost", "LOCALHOST:8000", "localhost.", "gpt.localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:80"]
    names += ["192.168.1.4:8000", "[fe80::1]", machine, machine.partition(".")[0] + ".local:8000"]
    for name in names:
        assert allows(guard, name), name


@pytest.mark.parametrize(
    "name",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "localhost@evil.example",
     "evil.example@localhost", "2130706433", "[::1", "127.0.0.1:80:80", "127.0.0.1, evil.example", "evillocalhost", ""],
)  # fmt: skip
def test_requests_to_other_names_are_refused(name: str) -> None:
    assert not allows(Guard(Access(), "127.0.0.1"), name)
    assert allows(Guard(Access(allow_host=("*",)), "127.0.0.1"), name)


def test_a_name_to_listen_at_or_of_a_flag_is_allowed() -> None:
    guard = Guard(Access(allow_host=("GPT.example:443", "proxy.example.")), "box.lan")
    for name in ("box.lan:8000", "gpt.example", "gpt.example:8000", "PROXY.example"):
        assert allows(guard, name)
    assert not allows(guard, "example")


def test_a_request_without_a_host_is_allowed_but_not_from_a_page() -> None:
    guard = Guard(Access(), "127.0.0.1")
    guard.check_site(Headers({}))  # HTTP/1.0
    with pytest.raises(APIError, match="may not use this server"):
        guard.check_site(Headers({"origin": "http://localhost"}))


def test_pages_of_the_same_host_are_allowed_and_others_only_by_flag() -> None:
    guard = Guard(Access(cors=("https://App.example:443/", "http://one.example:81")), "0.0.0.0")
    assert allows(guard, "127.0.0.1:8000", "http://localhost:3000")
    assert allows(guard, "localhost:8000", "http://[::1]:5173")
    assert allows(guard, "192.168.1.4:8000", "http://192.168.1.4")
    assert allows(guard, "localhost", PAGE)
    assert allows(guard, "localhost", "http://one.example:81")
    refused = ["https://evil.example", "http://app.example", "https://app.example:444", "http://one.example", "null"]
    refused += ["http://192.168.1.4", "http://localhost.evil.example", "https://app.example.evil", "file://", ""]
    refused += ["http://localhost@evil.example", "http://evil.example@localhost", "chrome-extension://abc"]
    for origin in refused:
        assert not allows(guard, "localhost", origin), origin
        assert not allows(guard, "localhost", PAGE, origin), origin
        assert allows(Guard(Access(cors=("*",)), "0.0.0.0"), "localhost", origin)
    assert not allows(guard, "192.168.1.4", "http://localhost:3000")  # a page of the client's machine


@pytest.mark.parametrize(
    "origin", ["app.example", "localhost:3000", "https://app.example/page", "https://", "*.example", ""]
)
def test_a_wrong_origin_is_refused_with_an_example(origin: str) -> None:
    with pytest.raises(UsageError, match=r"--cors must be \* or an origin such as http.*, not "):
        Guard(Access(cors=(origin,)), "127.0.0.1")


def test_requests_of_other_sites_are_answered_403(server: Client) -> None:
    for sent in (head(len(REQUEST), "connection: close", host="evil.example"),
                 head(len(REQUEST), "connection: close", "origin: https://evil.example")):  # fmt: skip
        answer = server.send(sent + REQUEST)
        assert status(answer) == 403
        assert b"access-control" not in answer


# Keys


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Bearer s3cret", 200),
        ("bearer  s3cret ", 200),
        ("Bearer s3cre", 401),
        ("Bearer s3crets", 401),
        ("Bearer ", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer é", 401),
    ],
)
def test_a_key_is_required(server: Client, header: str, expected: int) -> None:
    sent = head(len(REQUEST), "connection: close", f"authorization: {header}") + REQUEST
    answer = server.send(sent)
    assert status(answer) == expected
    assert (b"www-authenticate: Bearer" in answer) is (expected == 401)
    assert KEY.encode() not in answer


def test_every_path_but_health_needs_the_key(server: Client) -> None:
    for path in ("/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/nothing", "/health/"):
        assert server.get(path).error["code"] == "invalid_api_key"
    assert server.get("/health").status == 200


def test_openais_client_sends_the_key(server: Client) -> None:
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.port}/v1"
    assert openai.OpenAI(base_url=url, api_key=KEY).models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError, match="key") as refused:
        openai.OpenAI(base_url=url, api_key="other").models.list()
    assert refused.value.code == "invalid_api_key"


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GPT_API_KEY", "one")
    assert Guard(Access(), "127.0.0.1").key == "one"
    assert Guard(Access(api_key="two"), "127.0.0.1").key == "two"
    monkeypatch.delenv("MLX_GPT_API_KEY")
    assert Guard(Access(), "127.0.0.1").key is None


@pytest.mark.parametrize("key", ["", "two words", "kéy", "line\n"])
def test_an_unusable_key_is_refused_and_no_message_shows_it(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), "--api-key", key]) == 2
    assert the_line(capsys.readouterr().err) == "--api-key must be one or more characters of ASCII, without spaces"
    monkeypatch.setenv("MLX_GPT_API_KEY", key)
    assert main(["serve", str(folder)]) == 2
    assert the_line(capsys.readouterr().err).startswith("MLX_GPT_API_KEY must be one or more")
    assert "s3cret" not in repr(Access(api_key="s3cret"))


# CORS


def preflight(origin: str) -> bytes:
    lines = ("OPTIONS /v1/completions HTTP/1.1", "host: localhost", f"origin: {origin}", "connection: close")
    asked = ("access-control-request-method: POST", "access-control-request-headers: authorization,x-stainless-lang")
    return "\r\n".join([*lines, *asked, "", ""]).encode()


@pytest.mark.parametrize("origin", [PAGE, "null"])
def test_a_preflight_is_answered_without_the_key(server: Client, origin: str) -> None:
    answer = server.send(preflight(origin)).lower()
    assert status(answer) == 200
    assert f"access-control-allow-origin: {origin}\r\n".encode() in answer
    assert b"access-control-allow-headers: authorization,x-stainless-lang\r\n" in answer
    assert b"access-control-allow-methods: get, post\r\n" in answer


def test_a_preflight_of_another_origin_is_refused(server: Client) -> None:
    assert status(server.send(preflight("https://evil.example"))) == 403


@pytest.mark.parametrize(("key", "expected"), [(KEY, 200), ("wrong", 401)])
def test_a_page_may_read_answers_and_errors(server: Client, key: str, expected: int) -> None:
    answer = server.send(
        head(len(REQUEST), f"origin: {PAGE}", f"authorization: Bearer {key}", "connection: close") + REQUEST
    )
    assert status(answer) == expected
    assert b"access-control-allow-origin: https://app.example\r\n" in answer.lower()


def test_a_star_allows_every_page(folder: Path) -> None:
    with serving(folder, "--cors", "*") as server:
        assert b"access-control-allow-origin: *\r\n" in server.send(preflight("https://any.example")).lower()
        answer = server.send(head(len(REQUEST), "origin: https://any.example", "connection: close") + REQUEST)
        assert status(answer) == 200
        assert b"access-control-allow-origin: *\r\n" in answer.lower()
