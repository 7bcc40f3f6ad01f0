"""A local HTTP server with the part of the Hugging Face hub's file interface that its client uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
LARGE = (".safetensors", ".parquet", ".jsonl")  # stored by the hub under their sha256


class Hub:
    """The repositories of the server, the requests it received, and its faults."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}  # ada/tiny, or datasets/ada/texts -> revision -> folder
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}  # a repository, or repository/file -> status, headers
        self.requests: list[str] = []  # GET /ada/tiny/resolve/... and the range
        self.cut_after: list[int] = []  # bytes of a large file after which the connection ends, once each
        self.stalls = False  # the connection stays open but silent instead
        self.supports_ranges = True
        self.corrupts = False
        self.address = ""

    def add(self, name: str, *folders: Path) -> None:
        """Add a repository with a revision v0, v1, ... for each folder; the last is main."""
        commits = {f"{i:040x}": folder for i, folder in enumerate(folders)}
        tags = {f"v{i}": folder for i, folder in enumerate(folders)}
        self.repositories[name] = commits | tags | {"main": folders[-1]}

    def served(self) -> list[str]:
        """Return the names of the files that were sent."""
        paths = [line.split()[1] for line in self.requests if line.startswith("GET ") and "/resolve/" in line]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in paths]


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()

    class Handler(HubHandler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(endpoint: str, cache: Path, patch: pytest.MonkeyPatch, offline: bool = False) -> None:
    """Connect the client in this process to the hub at ``endpoint``, with its cache in ``cache``.

    Another process needs HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which the client reads when it is imported.
    """
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("no_proxy", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    close_session()  # the next one reads the proxies again


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        span = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {span}".strip())
        path = self.path.split("?")[0].replace("/api/models/", "/").replace("/api/datasets/", "/datasets/")
        parts = path.strip("/").split("/")
        at = next((i for i, part in enumerate(parts) if part in ("resolve", "tree", "revision")), len(parts))
        name, what, (revision, *file) = "/".join(parts[:at]), "".join(parts[at : at + 1]), parts[at + 1 :] or ["main"]
        if refusal := self.hub.refusals.get(name) or self.hub.refusals.get("/".join([name, *file])):
            self.answer(*refusal)
        elif name not in self.hub.repositories:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.hub.repositories[name]:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer_about(name, what, revision, "/".join(file))

    def answer_about(self, name: str, what: str, revision: str, file: str) -> None:
        folder = self.hub.repositories[name][revision]
        commit = next(one for one, place in self.hub.repositories[name].items() if len(one) == 40 and place == folder)
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "resolve":
            self.answer_file(folder / file, commit)
        elif what == "tree":
            self.answer_json([{"type": "file", "path": one, "oid": one, **about(folder / one)} for one in files])
        else:
            siblings = [{"rfilename": one, **about(folder / one)} for one in files]
            self.answer_json({"id": name, "sha": commit, "siblings": siblings})

    def answer_file(self, file: Path, commit: str) -> None:
        content, about_it = file.read_bytes(), about(file)
        etag = about_it["lfs"]["sha256"] if "lfs" in about_it else f"{file.name}-{len(content)}"
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.hub.corrupts and "lfs" in about_it:
            content = bytes(len(content))
        status, start = 200, 0
        if (span := self.headers.get("Range")) and self.hub.supports_ranges:
            start = int(span.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(status, headers, content[start:], cut="lfs" in about_it)

    def answer_json(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(
        self, status: int, headers: dict[str, str] | None = None, content: bytes = b"", cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.hub.cut_after:
            self.wfile.write(content[: self.hub.cut_after.pop(0)])
            self.wfile.flush()
            if self.hub.stalls:
                self.rfile.read(1)  # until the client disconnects
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def about(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if file.suffix not in LARGE:
        return {"size": size}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"size": size, "lfs": {"size": size, "sha256": digest, "oid": digest, "pointerSize": 134}}
