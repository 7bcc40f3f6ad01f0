"""Documents are the same from files, pipes and the cache, in every command."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TINY
from helpers.text_sources import ONE, ROWS, TWO, documents, parts, write

from mlx_gpt.cli import main
from mlx_gpt.errors import DataError
from mlx_gpt.text import prepare as prepare_module
from mlx_gpt.text.prepare import open_prepared, prepare_cached, prepare_text
from mlx_gpt.text.sources import find_sources
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld.stories import generate_stories

# Documents


def test_endoftext_separates_documents_everywhere(tmp_path: Path) -> None:
    text = f"{EOT}a{EOT}\n\nb\n{EOT}{EOT}c"
    for name, content in (("a.txt", text), ("a.jsonl", json.dumps({"text": text}))):
        assert documents(find_sources([str(write(tmp_path / name, content))])) == ["a", "b\n", "c"]
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode_documents(f"a{EOT}\nb") == [
        *tokenizer.encode("a"),
        tokenizer.eot_id,
        *tokenizer.encode("b"),
    ]


def test_one_record_is_split_like_the_same_text(tmp_path: Path) -> None:
    text = " ".join(generate_stories(60, seed=0))
    plain = parts(find_sources([str(write(tmp_path / "a.txt", text))]))
    assert all(plain)
    for name, content in (("b.jsonl", json.dumps({"text": text})), ("c.csv", f'text\n"{text}"\n'.replace('""', '"'))):
        if '"' not in text or name != "c.csv":
            assert parts(find_sources([str(write(tmp_path / name, content))])) == plain


# Pipes


@pytest.mark.parametrize("place", ["a.txt", "d/a.jsonl"])
def test_a_named_pipe_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / place)
    for name in {place, place.partition("/")[0]}:
        with pytest.raises(DataError, match="expected a file, found a named pipe"):
            documents(find_sources([str(tmp_path / name)]))


def test_a_device_is_refused() -> None:
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(DataError, match="expected a file, found a device"):
            documents(find_sources([name]))


@pytest.mark.parametrize(
    "content",
    [ONE + EOT + TWO, "\n".join(map(json.dumps, ROWS)), gzip.compress(json.dumps(ROWS).encode())],
)
def test_standard_input_and_process_substitution_are_read(
    content: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content.encode() if isinstance(content, str) else content
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    read, write_end = os.pipe()
    threading.Thread(target=lambda: (os.write(write_end, data), os.close(write_end))).start()
    for name in ("-", f"/dev/fd/{read}"):
        for _ in range(2):  # a pipe is copied once
            assert documents(find_sources([name])) == [ONE, TWO]
    os.close(read)


def test_train_reads_a_pipe_and_says_what_it_changed(tmp_path: Path) -> None:
    text = ("“smart quotes” and more. " * 90).encode("cp1252", "replace")
    train = ["train", "--data", "-", "--out", "run", *TINY, "--steps", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "mlx_gpt", *train],
        cwd=tmp_path,
        input=b"\xef\xbb\xbf" + text,
        capture_output=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert run.returncode == 0, run.stderr
    assert b"180 bytes were not UTF-8" in run.stderr
    assert b"a byte order mark was dropped (stdin)" in run.stderr


# The cache


def test_a_file_changed_under_the_same_size_and_time_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "a.txt", "aaaa " * 99)
    os.utime(file, ns=(0, 0))
    first = prepare_cached(find_sources([str(file)]), "bytes")
    write(file, "bbbb " * 99)
    os.utime(file, ns=(0, 0))
    again = prepare_cached(find_sources([str(file)]), "bytes")
    assert first.tokenizer.decode(first.train.ids[1:5]) == "aaaa"
    assert again.tokenizer.decode(again.train.ids[1:5]) == "bbbb"


def test_of_two_that_prepare_the_same_text_the_second_takes_the_first_ones_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write(tmp_path / "a.txt", "some text " * 99))
    write_parts = prepare_module._write_parts

    def and_another_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(prepare_module, "_write_parts", write_parts)
        prepare_text(find_sources([file]), "bytes", tmp_path / "out")
        return write_parts(*args)

    monkeypatch.setattr(prepare_module, "_write_parts", and_another_meanwhile)
    done = prepare_text(find_sources([file]), "bytes", tmp_path / "out")
    assert done.metadata == open_prepared(tmp_path / "out").metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_changes_are_reported_from_the_cache_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "a.txt", b"caf\xe9 " + b"and more text " * 99)
    for out in ("one", "two"):
        assert main(["train", "--data", "a.txt", "--out", out, *TINY, "--steps", "1"]) == 0
        assert capsys.readouterr().err.count("1 bytes were not UTF-8") == 1
