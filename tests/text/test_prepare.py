"""Prepared text on disk has the ids and documents of the text, or is refused."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gpt.cli import main
from mlx_gpt.errors import DataError
from mlx_gpt.text import cutting, decoding
from mlx_gpt.text import prepare as prepare_module
from mlx_gpt.text.prepare import Prepared, open_prepared, prepare_cached, prepare_text
from mlx_gpt.text.sources import find_sources
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.windows import TokenStream, Windows, endless_batches
from mlx_gpt.tinyworld.stories import generate_stories


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared(
    tmp_path: Path, *names: Path | str, tokenizer: str = "bytes", val: float = 0.2, out: str = "out"
) -> Prepared:
    return prepare_text(find_sources([str(name) for name in names], val, seed=0), tokenizer, tmp_path / out)


def read_in_pieces_of(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE", n)
    monkeypatch.setattr(cutting, "LONGEST", 8 * n)


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    pairs = zip(stream.starts[:-1], stream.starts[1:], strict=True)
    return [tokenizer.decode(stream.ids[start + 1 : end].tolist()) for start, end in pairs]


# The ids on disk are those of the text


def test_every_record_is_a_document_in_one_part(tmp_path: Path) -> None:
    stories = generate_stories(200, seed=0)
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", stories), tokenizer="bpe:400")
    parts = [documents(stream, done.tokenizer) for stream in (done.train, done.val)]
    assert sorted(parts[0] + parts[1]) == sorted(stories)
    assert 20 < len(parts[1]) < 60  # a fifth of them, at random
    assert done.metadata["train"]["documents"] == len(parts[0])
    assert done.metadata["val"]["bytes"] == sum(len(text.encode()) for text in parts[1])


def test_text_files_are_split_whole_if_there_are_enough(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    stories = generate_stories(30, seed=0)
    for i, story in enumerate(stories):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(story)
    done = prepared(tmp_path, tmp_path / "texts")
    parts = [documents(stream, done.tokenizer) for stream in (done.train, done.val)]
    assert sorted(parts[0] + parts[1]) == sorted(stories)
    assert parts[1]


def test_the_end_of_a_single_file_is_for_validation(tmp_path: Path) -> None:
    text = "\n".join(generate_stories(100, seed=0))
    (tmp_path / "one.txt").write_text(text)
    done = prepared(tmp_path, tmp_path / "one.txt")
    (train,), (val,) = documents(done.train, done.tokenizer), documents(done.val, done.tokenizer)
    assert train + val == text
    assert len(val) == pytest.approx(0.2 * len(text), rel=0.05)


def test_endoftext_in_a_file_separates_documents(tmp_path: Path) -> None:
    stories = generate_stories(60, seed=0)
    (tmp_path / "many.txt").write_text(f"\n{EOT}\n".join(stories))
    done = prepared(tmp_path, tmp_path / "many.txt")
    found = documents(done.train, done.tokenizer) + documents(done.val, done.tokenizer)
    assert 60 <= len(found) <= 61  # one of them may be cut for validation
    assert "".join(found).replace("\n", "") == "".join(stories).replace("\n", "")


SPACES = [" ", "\n", "\n\n", "  ", " \n ", "\u00a0 \u00a0", "\u3000 \u2003", "\u2028\n\u205f ", "\u0085 \u1680"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("piece", [97, 1000])
def test_a_text_read_in_pieces_has_the_ids_of_the_whole(
    piece: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcé漢\u3000の🙂'.,", k=rng.randint(1, 7))) for _ in range(3000)]
    text = words[0] + "".join(rng.choice(SPACES) + word for word in words[1:])
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    jsonl(tmp_path / "t.jsonl", [text[i : i + 3000] for i in range(0, len(text), 3000)])
    read_in_pieces_of(piece, monkeypatch)
    done = prepared(tmp_path, tmp_path / f"t.{kind}", tokenizer="bpe:500", val=0.4)
    train, val = documents(done.train, done.tokenizer), documents(done.val, done.tokenizer)
    parts = {train[0], text.removeprefix(train[0])} if kind == "txt" else {*re.findall(r"(?s).{1,3000}", text)}
    assert {*train, *val} == parts
    for stream, whole in ((done.train, train), (done.val, val)):
        ids = [i for document in whole for i in [done.tokenizer.eot_id, *done.tokenizer.encode(document)]]
        assert stream.ids[:-1].tolist() == ids


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_text_without_a_single_space_is_cut_between_characters(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in_pieces_of(100, monkeypatch)
    (tmp_path / "t.txt").write_text("漢字" * 3000, encoding="utf-8")
    jsonl(tmp_path / "t.jsonl", ["漢字" * 3000])
    sources = find_sources([str(tmp_path / f"t.{kind}")], 0.1, 0)
    pieces = list(sources.pieces())
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == "漢字" * 3000
    assert sources.replaced == 0


def test_batches_from_disk_equal_those_from_memory(tmp_path: Path) -> None:
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", generate_stories(80, seed=0)), tokenizer="bpe:400")
    assert isinstance(done.train.ids, np.memmap)
    assert done.train.ids.dtype == np.uint16
    texts = documents(done.train, done.tokenizer)
    in_memory = type(done.train).from_documents(texts, done.tokenizer)
    ours, theirs = (endless_batches(stream, 32, 4, seed=1) for stream in (done.train, in_memory))
    for _ in range(20):
        for a, b in zip(next(ours), next(theirs), strict=True):
            assert a.dtype == b.dtype == np.int32
            assert (a == b).all()
    assert (Windows.over(done.train, 32).starts == Windows.over(in_memory, 32).starts).all()


def test_the_seed_fixes_the_split_of_records(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "s.jsonl", generate_stories(100, seed=0)))
    val = [[piece.text for piece in find_sources([file], 0.3, seed).pieces() if piece.val] for seed in (0, 0, 1)]
    assert val[0] == val[1] != val[2]


def test_parquet_is_read_with_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stories = generate_stories(50, seed=0)
    parquet.write_table(pyarrow.table({"text": stories}), tmp_path / "s.parquet")
    done = prepared(tmp_path, tmp_path / "s.parquet")
    found = documents(done.train, done.tokenizer) + documents(done.val, done.tokenizer)
    assert sorted(found) == sorted(stories)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"bad.parquet: expected a parquet or Arrow file"):
        prepared(tmp_path, tmp_path / "bad.parquet", out="bad")


def test_a_folder_has_the_text_files_below_it_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "2.md").write_text("second")
    (tmp_path / "c.TXT").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "code.py").write_text("no text")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # macOS writes these on foreign disks
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    pieces = list(find_sources([str(tmp_path)], 0.01).pieces())
    assert [piece.text for piece in pieces if piece.starts and not piece.val] == ["first", "second", "third"]


def test_a_file_from_windows_reads_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert "".join(piece.text for piece in find_sources([str(tmp_path / "dos.txt")]).pieces()) == "one\ntwo\n"


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "folder"])
def test_a_name_without_text_files_is_refused_with_the_names_of_the_corpora(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"no \.txt, \.md, .*\.arrow files in it; named corpora are tinyworld"):
        find_sources([str(tmp_path / name)])


# The cache


def test_the_cache_is_reused_until_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = jsonl(tmp_path / "s.jsonl", generate_stories(40, seed=0))
    first = prepare_cached(find_sources([str(file)], 0.2, 0), "bytes")
    again = prepare_cached(find_sources([str(file)], 0.2, 0), "bytes")
    assert again.folder == first.folder
    jsonl(file, generate_stories(41, seed=0))
    assert prepare_cached(find_sources([str(file)], 0.2, 0), "bytes").folder != first.folder
    (first.folder / "train.bin").write_bytes(b"")
    jsonl(file, generate_stories(40, seed=0))
    os.utime(file, ns=(0, 0))
    whole = prepare_cached(find_sources([str(file)], 0.2, 0), "bytes")
    (whole.folder / "train.bin").write_bytes(b"")  # a damaged copy is prepared again
    assert prepare_cached(find_sources([str(file)], 0.2, 0), "bytes").train.n_tokens == first.train.n_tokens


# Errors


def last_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["prepare", *arguments])
    message = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    return message[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "found none for train"),
        ("binary.txt", b"\x89PNG\r\n\0\0\0", "found a binary file"),
        ("latin.txt", bytes(range(160, 250)) * 50, "expected UTF-8 text, but"),
        ("stray.txt", b"\x80" * 3_000_000, "expected UTF-8 text, but"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "bad.jsonl, line 2: expected"),
        ("field.jsonl", b'{"body": "a"}\n', "line 1: expected"),
    ],
)
def test_invalid_text_is_one_clear_line_and_leaves_nothing(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    assert message in last_line(capsys, str(tmp_path / name), "--out", str(out), "--tokenizer", "bytes")
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]


def test_invalid_utf8_is_replaced_counted_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes(b"word \xff word \xfe word\n" + b"and more words here\n" * 50)
    assert main(["prepare", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().err.count("2 bytes were not UTF-8") == 1
    assert open_prepared(tmp_path / "out").metadata["bytes_replaced"] == 2


def test_one_character_repeated_is_text_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a" * 5000)
    done = prepared(tmp_path, tmp_path / "a.txt")
    assert done.train.n_tokens + done.val.n_tokens == 5002
    # BPE finds few pairs there, and reports how many
    message = last_line(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "b"), "--tokenizer", "bpe:1000")
    assert "ask for bpe:" in message


def test_a_missing_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    sources = find_sources(
        [str(jsonl(tmp_path / f"{i}.jsonl", generate_stories(20, seed=0))) for i in range(2)], 0.2, 0
    )
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(DataError, match=r"1.jsonl: cannot be read"):
        prepare_text(sources, "bytes", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["0.jsonl"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Path.unlink, "cannot be read"),
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            "changed while|line .* expected|parquet",
        ),
        (lambda path: path.write_bytes(2 * path.read_bytes()), "changed while it was read"),
        (lambda path: path.replace(path.with_name("elsewhere")), "cannot be read"),
    ],
    ids=["deleted", "cut short", "longer", "moved away"],
)
def test_a_file_that_vanishes_or_changes_while_it_is_read_is_refused_and_leaves_nothing(
    kind: str, what: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH", 1 << 10)
    read_in_pieces_of(1 << 10, monkeypatch)
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": generate_stories(3000, seed=0)}), file, row_group_size=100)
    else:
        jsonl(file, generate_stories(1000, seed=0)) if kind == "jsonl" else file.write_text(
            "\n".join(generate_stories(1000, seed=0))
        )
    blocks: list[int] = []

    def between(n: int) -> None:
        blocks.append(n)
        if len(blocks) == 2:
            what(file)

    with pytest.raises(DataError, match=rf"t.{kind}.*({message})"):
        prepare_text(find_sources([str(file)], 0.2, 0), "bytes", tmp_path / "out", between)
    assert len(blocks) >= 2
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_folder_of_another_tokenizer_or_with_a_truncated_file_is_refused(tmp_path: Path) -> None:
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", generate_stories(40, seed=0)))
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        prepare_module.check_tokenizer(done.metadata, Tokenizer.train(generate_stories(40, seed=0), 300), done.folder)
    ids = done.folder / "train.bin"
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train.bin: expected \d+ bytes, found \d+"):
        open_prepared(done.folder)
    Tokenizer.train(generate_stories(40, seed=0), 300).save(done.folder)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        open_prepared(done.folder)
    with pytest.raises(DataError, match="expected a file written by mlx-gpt prepare"):
        open_prepared(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "s.jsonl", generate_stories(300, seed=0))
    code = (
        "import resource, signal, sys; from mlx_gpt.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["prepare", str(file), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert "out: cannot be written (File too large); make room" in run.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["s.jsonl"]


def test_a_killed_process_leaves_no_prepared_folder(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "s.jsonl", generate_stories(3000, seed=0))
    slow = (
        "import sys, time, mlx_gpt.text.prepare as p; from mlx_gpt.cli import main; p.BATCH = 1; "
        "write = p._Writer.write; p._Writer.write = lambda *a: (write(*a), time.sleep(0.01)); main(sys.argv[1:])"
    )
    arguments = ["prepare", str(file), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    run = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".saving-*/out/train.bin")):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0  # and nothing is in the way
    assert open_prepared(tmp_path / "out").train.n_tokens


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read from /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_stays_flat_however_long_the_text(kind: str, tmp_path: Path) -> None:
    """For a text file, and for a record in one line with another field of the same length."""
    measure = (
        "import re, sys, mlx_gpt.text.prepare as p, mlx_gpt.text.decoding as d, mlx_gpt.text.json_records as r, "
        "mlx_gpt.text.cutting as c; "
        "from mlx_gpt.cli import main; "
        "p.BATCH, d.PIECE, r.LONG, c.LONGEST = 1 << 18, 1 << 15, 1 << 18, 1 << 18; main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    text = " ".join(generate_stories(1000, seed=0)) + "\n"
    file = tmp_path / f"t.{kind}"
    peaks, sizes = [], []
    for times in (6, 26):  # 2.5 and 11 MB of text
        if kind == "txt":
            file.write_text(text * times)
        else:
            records = [{"text": text}, {"html": [text * times], "text": text * times}]
            file.write_text("".join(json.dumps(record) + "\n" for record in [*records, *[{"text": text}] * 8]))
        command = [sys.executable, "-c", measure, "prepare", str(file), "--tokenizer", "bytes"]
        run = subprocess.run(
            [*command, "--out", str(tmp_path / f"{times}")], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout.split()[-1]))
        sizes.append(file.stat().st_size / 1024)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 2, peaks  # kB
