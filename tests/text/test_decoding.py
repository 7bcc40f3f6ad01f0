"""Text of every encoding and line end is read alike, and what was changed is reported; what is not text is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.text_sources import ONE, documents, parts, write

from mlx_gpt.errors import DataError
from mlx_gpt.text.sources import find_sources, read_text


@pytest.mark.parametrize(
    ("content", "text", "change"),
    [
        (ONE.encode(), ONE, ""),
        (ONE.encode("utf-8-sig"), ONE, "a byte order mark was dropped (a.txt)"),
        (ONE.encode("utf-16"), ONE, "a byte order mark was dropped (a.txt)"),
        (b"\xfe\xff" + ONE.encode("utf-16-be"), ONE, "a byte order mark was dropped (a.txt)"),
        (ONE.encode("utf-32"), ONE, "a byte order mark was dropped (a.txt)"),
        (b"\0\0\xfe\xff" + ONE.encode("utf-32-be"), ONE, "a byte order mark was dropped (a.txt)"),
        (b"a\r\nb\r\n", "a\nb\n", r"the line ends \r\n and \r became \n (a.txt)"),
        (b"a\rb\r", "a\nb\n", r"the line ends \r\n and \r became \n (a.txt)"),
        (b"caf\xe9 and \xe2\x82", "caf\ufffd and \ufffd", "3 bytes were not UTF-8 and were replaced by U+FFFD (a.txt)"),
        ("genuine \ufffd".encode(), "genuine \ufffd", ""),
    ],
)
def test_encodings_and_line_ends_are_read_alike_and_reported(
    content: bytes, text: str, change: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.txt", content)
    sources = find_sources([str(file)])
    assert "".join(documents(sources)) == text
    assert sources.changes == change
    read, changes = read_text(file)
    assert (read, str(changes)) == (text, change)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_records_have_the_same_encodings_and_line_ends(name: str, encoding: str, tmp_path: Path) -> None:
    content = {"a.json": '\r\n{"text":\r\n"\\ufeffé\\r\\n\\ud83d"}\r\n', "a.csv": 'text\r\n"\ufeffé\r\n\ufffd"\r\n'}[
        name
    ]
    sources = find_sources([str(write(tmp_path / name, content.encode(encoding)))])
    assert documents(sources) == ["é\n\ufffd"]
    assert "a byte order mark was dropped" in sources.changes
    assert "line ends" in sources.changes


def test_a_character_and_a_line_end_cut_by_a_piece_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gpt.text.decoding.PIECE", 3)
    text = "ab\r\ncd\r\r\n漢字 e\r\n"
    file = write(tmp_path / "a.txt", text)
    assert "".join(documents(find_sources([str(file)]))) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\0\0\0", b"text " * 9000 + b"\0", bytes(range(160, 250)) * 50])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ""])
def test_a_file_that_is_not_text_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a{suffix}"):
        documents(find_sources([str(write(tmp_path / f"a{suffix}", content))]))


def test_the_place_of_a_zero_byte_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gpt.text.decoding.PIECE", 7)
    file = write(tmp_path / "a.txt", "1 line\r\n" * 9 + "and \0")
    for use in (lambda: documents(find_sources([str(file)])), lambda: read_text(file)):
        with pytest.raises(DataError, match=r"a.txt: expected text, found a binary file .*the first in line 10\)"):
            use()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="a file of the system, whose size is 0")
def test_a_file_of_the_system_is_split_by_its_text(tmp_path: Path) -> None:
    assert all(parts(find_sources(["/proc/version"])))


def test_a_sparse_file_is_refused_at_its_first_hole(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "text " * 9000)
    os.truncate(file, 1 << 42)
    with pytest.raises(DataError, match=r"a.txt: expected text, found a binary file"):
        documents(find_sources([str(file)]))
