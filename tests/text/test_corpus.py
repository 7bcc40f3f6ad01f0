"""Text arrives whole, or an error says in one line what was expected, what came and what to do."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import cache_folder
from mlx_gpt.text import corpus
from mlx_gpt.text.corpus import load_corpus, split

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
    """Stands in for GitHub; ``shakespeare`` is PLAY, and the cache is in tmp_path."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Files and folders ------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_whose_end_is_for_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    read = load_corpus(str(tmp_path / "book.txt"))
    assert (len(read.train), len(read.val)) == (1, 1)
    assert read.train[0] + read.val[0] == text
    assert read.val[0].startswith("line 9")


def test_a_folder_gives_a_document_for_each_text_file_below_it_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "2.md").write_text("second")
    (tmp_path / "c.TXT").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "code.py").write_text("no text")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # macOS leaves these on foreign disks
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    assert corpus.read_folder(tmp_path) == ["first", "second", "third"]


def test_a_file_from_windows_reads_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert corpus.read_text(tmp_path / "dos.txt") == "one\ntwo\n"


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"abc caf\xe9 x")
    for source in (tmp_path / "latin.txt", tmp_path):
        with pytest.raises(
            DataError, match=r"latin\.txt: expected UTF-8 text, found the byte 0xe9 at byte offset 7"
        ) as e:
            load_corpus(str(source))
        one_line(e)


@pytest.mark.parametrize("data", [b"", b" \n\t\n", b"\xef\xbb\xbf"], ids=["empty", "white", "mark"])
def test_a_file_without_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "none.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"none\.txt: expected text, found") as e:
        load_corpus(str(tmp_path / "none.txt"))
    one_line(e)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.md").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected \.txt or \.md files with text, found 1 such files and no text") as e:
        load_corpus(str(tmp_path))
    one_line(e)


def test_a_name_that_is_nothing_is_told_what_it_could_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; the data is tinyworld, shakespeare, a text file") as e:
        load_corpus(str(tmp_path / "shakespaere"))
    one_line(e)


# Two parts --------------------------------------------------------------------------------------------------------


def test_many_documents_are_split_whole_and_each_lands_in_one_part() -> None:
    documents = [f"story {i} " * (1 + i % 7) for i in range(500)]
    train, val = split(documents)
    assert sorted(train + val) == sorted(documents)
    share = sum(map(len, val)) / sum(map(len, documents))
    assert share == pytest.approx(0.1, abs=0.005)
    assert train == [d for d in documents if d in set(train)], "the documents keep their order"
    assert val != documents[-len(val) :], "drawn from everywhere, not from one end"


def test_the_split_is_the_same_every_time_and_another_for_another_seed() -> None:
    documents = [f"story {i}" for i in range(200)]
    assert split(documents) == split(documents)
    assert split(documents, seed=1) != split(documents)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_few_documents_each_give_their_end(size: int) -> None:
    documents = [f"{i} ".join(["word"] * 1000) for i in range(size)]
    train, val = split(documents, val_fraction=0.2)
    if size < 5:  # fewer than one whole document's worth
        assert [a + b for a, b in zip(train, val, strict=True)] == documents
        assert sum(map(len, val)) / sum(map(len, documents)) == pytest.approx(0.2, abs=0.01)
    else:
        assert len(val) == 1
        assert val[0] in documents


def test_a_giant_among_dwarfs_does_not_leave_validation_with_the_dwarfs() -> None:
    documents = ["a word " * 100_000, *["dwarf"] * 30]
    _, val = split(documents)
    assert sum(map(len, val)) == pytest.approx(70_000, rel=0.1)


def test_the_cut_falls_where_a_line_begins_or_else_a_word_or_else_anywhere() -> None:
    assert split(["one two three\n" * 100])[1] == ["one two three\n" * 10]
    assert split(["one two three\n" * 96])[1] == ["one two three\n" * 10]
    assert split(["hello " * 100])[1] == ["hello " * 10]
    assert split(["a title\n" + "hello " * 1000])[1] == ["hello " * 101], "a line break far away does not count"
    assert split(["漢" * 100]) == (["漢" * 90], ["漢" * 10])


@pytest.mark.parametrize("documents", [[], [""], ["a"], ["\n" * 100]])
def test_too_little_text_for_two_parts_is_refused(documents: list[str]) -> None:
    with pytest.raises(DataError, match="expected enough text to keep 10% of it for validation") as e:
        split(documents)
    one_line(e)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10, float("nan")])
def test_a_share_that_cannot_be_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        load_corpus("tinyworld", val_fraction=fraction)


# The story world --------------------------------------------------------------------------------------------------


def test_tinyworld_tells_validation_stories_of_its_own() -> None:
    told = load_corpus("tinyworld", n_stories=200)
    assert (len(told.train), len(told.val)) == (200, 20)
    assert not set(told.train) & set(told.val)
    assert load_corpus("tinyworld", n_stories=200) == told
    with pytest.raises(UsageError, match="at least 1"):
        load_corpus("tinyworld", n_stories=0)


def test_no_seed_of_tinyworld_trains_on_the_validation_stories_of_another() -> None:
    told = [load_corpus("tinyworld", n_stories=50, seed=seed) for seed in range(4)]
    train = {story for one in told for story in one.train}
    val = {story for one in told for story in one.val}
    assert len(train) == 200
    assert not train & val


# Tiny Shakespeare -------------------------------------------------------------------------------------------------


def test_shakespeare_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    first = load_corpus("shakespeare")
    assert "".join(first.train + first.val).encode() == PLAY
    assert server.requests == 1
    assert load_corpus("shakespeare") == first
    assert server.requests == 1
    assert [file.name for file in (tmp_path / "mlx_gpt").iterdir()] == ["tinyshakespeare.txt"]


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mlx_gpt").mkdir()
    (tmp_path / "mlx_gpt" / "tinyshakespeare.txt").write_bytes(PLAY[:-1])
    load_corpus("shakespeare")
    assert (tmp_path / "mlx_gpt" / "tinyshakespeare.txt").read_bytes() == PLAY


def refused(server: Server, tmp_path: Path) -> str:
    """The one line that a failed download gives; it names the remedy, and nothing is left behind."""
    with pytest.raises(DataError, match="by hand and give the file's path") as e:
        load_corpus("shakespeare")
    assert server.url in str(e.value)
    assert not list(tmp_path.rglob("*.txt*"))
    return one_line(e)


def test_a_download_with_the_wrong_hash_is_refused(server: Server, tmp_path: Path) -> None:
    server.body = PLAY + b"!"
    wrong = hashlib.sha256(server.body).hexdigest()
    assert f"found {wrong[:8]}… ({len(PLAY) + 1} bytes)" in refused(server, tmp_path)


def test_a_download_cut_short_is_refused(server: Server, tmp_path: Path) -> None:
    server.missing = 100
    assert "100 more expected" in refused(server, tmp_path)


def test_a_page_that_is_gone_is_refused(server: Server, tmp_path: Path) -> None:
    server.status = 404
    assert "404" in refused(server, tmp_path)


def test_without_a_network_the_error_names_the_remedy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.url = "http://127.0.0.1:9/input.txt"  # nobody listens there
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", server.url)
    assert "refused" in refused(server, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mlx_gpt").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be written.*set XDG_CACHE_HOME") as e:
        load_corpus("shakespeare")
    one_line(e)


def test_a_disk_that_is_full_leaves_no_half_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        load_corpus("shakespeare")
    assert not list((tmp_path / "mlx_gpt").iterdir())


def test_without_xdg_cache_home_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for relative in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == Path.home() / ".cache" / "mlx_gpt"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/text/tinyshakespeare.txt")
def test_the_expected_hash_is_that_of_tiny_shakespeare() -> None:
    data = (DATA / "tinyshakespeare.txt").read_bytes()
    assert len(data) == 1_115_394
    assert hashlib.sha256(data).hexdigest() == corpus.SHAKESPEARE_SHA256
