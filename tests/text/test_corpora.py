"""A named corpus is complete, or an error in one line has what was expected, what was found and the remedy."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gpt.errors import DataError
from mlx_gpt.files import cache_folder
from mlx_gpt.text import corpora
from mlx_gpt.text.corpora import CORPORA, FileCorpus, GeneratedCorpus, tiny_shakespeare, tinyworld
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.sources import find_sources
from mlx_gpt.text.tokenizer import make_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data" / "text"
PLAY = b"".join(b"ACT %d\nSpeak, speak.\n\n" % i for i in range(200))


class Server:
    """A web server on this machine that answers every request with ``body``, and counts them."""

    def __init__(self) -> None:
        self.body, self.status, self.missing, self.requests = PLAY, 200, 0, 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(server.body)))
                self.end_headers()
                self.wfile.write(server.body[: len(server.body) - server.missing])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/input.txt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A substitute for GitHub, on which ``shakespeare`` is PLAY; the cache is in tmp_path."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_entry_in_the_table_is_all_that_a_corpus_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "play.txt").write_bytes(PLAY)
    monkeypatch.setitem(CORPORA, "play", FileCorpus(lambda: tmp_path / "play.txt"))
    monkeypatch.setitem(CORPORA, "made", GeneratedCorpus(lambda: (["abc"], ["ab"]), lambda texts, n: n / 8, "bytes"))
    play, made = load_dataset("play", "bytes"), load_dataset("made", "bytes")
    assert play.tokenizer.decode(play.train.ids[1:-1]) + play.tokenizer.decode(play.val.ids[1:-1]) == PLAY.decode()
    assert made.val.n_tokens == 3
    assert made.baselines["best possible"] == 3 / 8
    with pytest.raises(DataError, match="named corpora are tinyworld, shakespeare, tinystories, fineweb-edu, play"):
        load_dataset(str(tmp_path / "none"), "bytes")


def test_a_generated_corpus_needs_no_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="generated in memory, it needs no preparation: mlx-gpt train --data tinyworld"):
        find_sources(["tinyworld"])


# tinyworld ------------------------------------------------------------------------------------------------------------


def test_the_default_tokenizer_of_tinyworld_can_be_learned_from_it() -> None:
    corpus = CORPORA["tinyworld"]
    assert isinstance(corpus, GeneratedCorpus)
    train, _ = tinyworld(n_train=2000, n_val=1)
    assert make_tokenizer(corpus.tokenizer, train).vocab_size == int(corpus.tokenizer.removeprefix("bpe:"))


def test_tinyworld_has_validation_stories_of_another_seed() -> None:
    train, val = tinyworld(200, 20)
    assert (len(train), len(val)) == (200, 20)
    assert not set(train) & set(val)
    assert tinyworld(200, 20) == (train, val)


def test_no_seed_of_tinyworld_trains_on_the_validation_stories_of_another() -> None:
    parts = [tinyworld(50, 50, seed) for seed in range(4)]
    train = {story for one, _ in parts for story in one}
    val = {story for _, one in parts for story in one}
    assert len(train) == len(val) == 200
    assert not train & val


# Tiny Shakespeare -------------------------------------------------------------------------------------------------


def test_shakespeare_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    first = tiny_shakespeare()
    assert first.read_bytes() == PLAY
    assert server.requests == 1
    assert tiny_shakespeare() == first
    assert server.requests == 1
    assert [file.name for file in (tmp_path / "mlx_gpt").iterdir()] == ["tinyshakespeare.txt"]


def test_a_damaged_file_in_the_cache_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mlx_gpt").mkdir()
    (tmp_path / "mlx_gpt" / "tinyshakespeare.txt").write_bytes(PLAY[:-1])
    tiny_shakespeare()
    assert (tmp_path / "mlx_gpt" / "tinyshakespeare.txt").read_bytes() == PLAY


def refused(server: Server, tmp_path: Path) -> str:
    """The error of a failed download, one line with the remedy; no file is left behind."""
    with pytest.raises(DataError, match="by hand and give the file's path") as e:
        tiny_shakespeare()
    assert server.url in str(e.value)
    assert not list(tmp_path.rglob("*.txt*"))
    return one_line(e)


def test_a_download_with_the_wrong_hash_is_refused(server: Server, tmp_path: Path) -> None:
    server.body = PLAY + b"!"
    wrong = hashlib.sha256(server.body).hexdigest()
    assert f"found {wrong[:8]}… ({len(PLAY) + 1} bytes)" in refused(server, tmp_path)


def test_a_truncated_download_is_refused(server: Server, tmp_path: Path) -> None:
    server.missing = 100
    assert "100 more expected" in refused(server, tmp_path)


def test_a_missing_page_is_refused(server: Server, tmp_path: Path) -> None:
    server.status = 404
    assert "404" in refused(server, tmp_path)


def test_without_a_network_the_error_names_the_remedy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.url = "http://127.0.0.1:9/input.txt"  # a closed port
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", server.url)
    assert "refused" in refused(server, tmp_path)


def test_an_unwritable_cache_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mlx_gpt").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be written.*set XDG_CACHE_HOME") as e:
        tiny_shakespeare()
    one_line(e)


def test_a_full_disk_leaves_no_partial_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        tiny_shakespeare()
    assert not list((tmp_path / "mlx_gpt").iterdir())


def test_without_xdg_cache_home_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for relative in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == Path.home() / ".cache" / "mlx_gpt"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/text/tinyshakespeare.txt")
def test_the_expected_hash_is_that_of_tiny_shakespeare() -> None:
    data = (DATA / "tinyshakespeare.txt").read_bytes()
    assert len(data) == 1_115_394
    assert hashlib.sha256(data).hexdigest() == corpora.SHAKESPEARE_SHA256
