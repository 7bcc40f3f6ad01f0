"""Text prepared on disk is the text: the same ids, the same documents, and never half of it."""

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
from mlx_gpt.text import prepare as prepare_module
from mlx_gpt.text import records as records_module
from mlx_gpt.text import sources as sources_module
from mlx_gpt.text.prepare import Prepared, cached, open_prepared, prepare_text
from mlx_gpt.text.sources import find_sources
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import EOT
from mlx_gpt.text.windows import TokenStream, Windows, endless_batches
from mlx_gpt.tinyworld import stories as tinyworld


def told(n: int, seed: int = 0) -> list[str]:
    return tinyworld.generate_stories(n, seed)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared(
    tmp_path: Path, *names: Path | str, tokenizer: str = "bytes", val: float = 0.2, out: str = "out"
) -> Prepared:
    return prepare_text(find_sources([str(name) for name in names], val, seed=0), tokenizer, tmp_path / out)


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    pairs = zip(stream.starts[:-1], stream.starts[1:], strict=True)
    return [tokenizer.decode(stream.ids[start + 1 : end].tolist()) for start, end in pairs]


# What is written is what was read


def test_every_record_is_one_document_of_one_part(tmp_path: Path) -> None:
    stories = told(200)
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", stories), tokenizer="bpe:400")
    parts = [documents(stream, done.tokenizer) for stream in (done.train, done.val)]
    assert sorted(parts[0] + parts[1]) == sorted(stories)
    assert 20 < len(parts[1]) < 60  # a fifth of them, by lot
    assert done.about["train"]["documents"] == len(parts[0])
    assert done.about["val"]["bytes"] == sum(len(text.encode()) for text in parts[1])


def test_text_files_are_drawn_whole_where_there_are_enough_of_them(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    stories = told(30)
    for i, story in enumerate(stories):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(story)
    done = prepared(tmp_path, tmp_path / "texts")
    parts = [documents(stream, done.tokenizer) for stream in (done.train, done.val)]
    assert sorted(parts[0] + parts[1]) == sorted(stories)
    assert parts[1]


def test_one_file_is_measured_by_its_end(tmp_path: Path) -> None:
    text = "\n".join(told(100))
    (tmp_path / "one.txt").write_text(text)
    done = prepared(tmp_path, tmp_path / "one.txt")
    (train,), (val,) = documents(done.train, done.tokenizer), documents(done.val, done.tokenizer)
    assert train + val == text
    assert len(val) == pytest.approx(0.2 * len(text), rel=0.05)


def test_the_end_of_text_mark_in_a_file_parts_documents(tmp_path: Path) -> None:
    stories = told(60)
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
    monkeypatch.setattr(sources_module, "PIECE", piece)
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
    monkeypatch.setattr(sources_module, "PIECE", 100)
    (tmp_path / "t.txt").write_text("漢字" * 3000, encoding="utf-8")
    jsonl(tmp_path / "t.jsonl", ["漢字" * 3000])
    sources = find_sources([str(tmp_path / f"t.{kind}")], 0.1, 0)
    pieces = list(sources.pieces())
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == "漢字" * 3000
    assert sources.replaced == 0


LONG_LINES = [
    {"text": "plain " * 20},
    {"id": 7, "meta": {"a": [1, -2.5e-3, {}, [], [[]], None, True], "text": "no"}, "text": "the one", "z": "}]"},
    {
        "texts": "no",
        "te": "no",
        "": "",
        "x" * 200: ["\ud83d\ude00" * 90],
        "text": 'quotes " \\ \\" and / \b\f\n\r\t \u2028',
    },
    {"text": "🙂漢é\0" * 60},
    {"text": "half a pair \ud83d and \ude00, turned \ude00\ud83d" * 5},
    {"text": "\\" * 99 + '"' + "\\ud83d" * 9},
    {"text": ""},
    {"text": None},
]


@pytest.mark.parametrize("ahead", [13, 64, 1000])
@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("indent", [None, 0])
def test_a_line_read_as_it_comes_has_the_text_that_json_finds_in_it(
    ahead: int, escaped: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "LONG", 16)
    monkeypatch.setattr(records_module, "AHEAD", ahead)
    lines = [json.dumps(record, indent=indent).replace("\n", " \t\r") for record in LONG_LINES]
    if not escaped:
        lines = [json.dumps(json.loads(line), ensure_ascii="half" in line) for line in lines]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = ["".join(pieces) for pieces in records_module.json_records(tmp_path / "t.jsonl")]
    assert found == [json.loads(line)["text"] or "" for line in lines]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "cut short, in the middle', "cut short"),
        ('{"text": "cut short, in an escape \\u12', "cut short"),
        ('{"text": "and not closed, but for the string"', "is missing"),
        ('{"text": "an escape that is none: \\q"}', "Invalid"),
        ('{"text": "a tab that is none:\t, as it is raw"}', "Invalid"),
        ('{"text": "more follows it in the line"} {}', "more follows"),
        ('{"text": "a field too many", "text": "there"}', "twice"),
        ('{"text": "a comma and nothing after it", }', '" is missing'),
        ('{"other": [1, 2, 3, 4, 5, ], "text": "a comma"}', "Expecting value"),
        ('{"other": tru, "text": "no word of JSON\'s"}', "Expecting value"),
        ('{"other": 1 "text": "no comma between these"}', ", is missing"),
        ('{"a long name": "and no text at all in it"}', "no 'text'"),
        ('{"text": 12345678901234567890123456789}', "its text is 123456"),
        ('["text", "a list of some texts, in one line"]', "{ is missing"),
        ('{"other": ' + "[" * 100_000, "(?s)recursion|deep"),
        (b'{"text": "bytes that are no UTF-8: \xff, in it"}', "decode"),
    ],
)
def test_a_long_line_that_is_no_record_is_told_like_a_short_one(
    line: str | bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b'{"text": "a"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    (tmp_path / "t.jsonl").write_bytes(data)
    for long in (1 << 21, 32):
        monkeypatch.setattr(records_module, "LONG", long)
        with pytest.raises(DataError, match=r't.jsonl, line 2: expected {"text": "..."}, found b') as refused:
            [list(pieces) for pieces in records_module.json_records(tmp_path / "t.jsonl")]
    assert re.search(why, str(refused.value))


def test_batches_of_what_is_mapped_equal_those_of_what_is_in_memory(tmp_path: Path) -> None:
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", told(80)), tokenizer="bpe:400")
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


def test_the_same_text_and_seed_are_split_alike_and_another_seed_otherwise(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "s.jsonl", told(100)))
    val = [[piece.text for piece in find_sources([file], 0.3, seed).pieces() if piece.val] for seed in (0, 0, 1)]
    assert val[0] == val[1] != val[2]


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stories = told(50)
    parquet.write_table(pyarrow.table({"text": stories}), tmp_path / "s.parquet")
    done = prepared(tmp_path, tmp_path / "s.parquet")
    found = documents(done.train, done.tokenizer) + documents(done.val, done.tokenizer)
    assert sorted(found) == sorted(stories)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"bad.parquet: expected a parquet file"):
        prepared(tmp_path, tmp_path / "bad.parquet", out="bad")


# The cache


def test_the_cache_is_used_again_until_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = jsonl(tmp_path / "s.jsonl", told(40))
    first = cached(find_sources([str(file)], 0.2, 0), "bytes")
    again = cached(find_sources([str(file)], 0.2, 0), "bytes")
    assert again.folder == first.folder
    jsonl(file, told(41))
    assert cached(find_sources([str(file)], 0.2, 0), "bytes").folder != first.folder
    (first.folder / "train.bin").write_bytes(b"")
    jsonl(file, told(40))
    os.utime(file, ns=(0, 0))
    whole = cached(find_sources([str(file)], 0.2, 0), "bytes")
    (whole.folder / "train.bin").write_bytes(b"")  # a damaged copy is made again
    assert cached(find_sources([str(file)], 0.2, 0), "bytes").train.n_tokens == first.train.n_tokens


# What goes wrong


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["prepare", *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    return said[-1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "found nothing for train"),
        ("binary.txt", b"\x89PNG\r\n\0\0\0", "found a binary file"),
        ("latin.txt", bytes(range(160, 250)) * 50, "expected UTF-8 text, but"),
        ("stray.txt", b"\x80" * 3_000_000, "expected UTF-8 text, but"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "bad.jsonl, line 2: expected"),
        ("field.jsonl", b'{"body": "a"}\n', "line 1: expected"),
    ],
)
def test_what_is_no_text_is_one_clear_line_and_nothing_is_left(
    name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    assert said in complaint(capsys, str(tmp_path / name), "--out", str(out), "--tokenizer", "bytes")
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]


def test_bytes_that_are_no_utf8_are_replaced_counted_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_bytes(b"word \xff word \xfe word\n" + b"and more words here\n" * 50)
    assert main(["prepare", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().err.count("2 bytes were no UTF-8") == 1
    assert open_prepared(tmp_path / "out").about["bytes_replaced"] == 2


def test_one_character_repeated_is_text_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a" * 5000)
    done = prepared(tmp_path, tmp_path / "a.txt")
    assert done.train.n_tokens + done.val.n_tokens == 5002
    # BPE finds few pairs there: it says how many
    said = complaint(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "b"), "--tokenizer", "bpe:1000")
    assert "ask for bpe:" in said


def test_a_file_that_vanishes_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    sources = find_sources([str(jsonl(tmp_path / f"{i}.jsonl", told(20))) for i in range(2)], 0.2, 0)
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(DataError, match=r"1.jsonl: cannot be read"):
        prepare_text(sources, "bytes", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["0.jsonl"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("what", "said"),
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
def test_a_file_that_vanishes_or_changes_while_it_is_read_is_told_and_leaves_nothing(
    kind: str, what: Callable[[Path], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH", 1 << 10)
    monkeypatch.setattr(sources_module, "PIECE", 1 << 10)
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": told(3000)}), file, row_group_size=100)
    else:
        jsonl(file, told(1000)) if kind == "jsonl" else file.write_text("\n".join(told(1000)))
    blocks: list[int] = []

    def between(n: int) -> None:
        blocks.append(n)
        if len(blocks) == 2:
            what(file)

    with pytest.raises(DataError, match=rf"t.{kind}.*({said})"):
        prepare_text(find_sources([str(file)], 0.2, 0), "bytes", tmp_path / "out", between)
    assert len(blocks) >= 2
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_was_prepared_with_another_tokenizer_or_cut_short_is_refused(tmp_path: Path) -> None:
    done = prepared(tmp_path, jsonl(tmp_path / "s.jsonl", told(40)))
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        prepare_module.check_tokenizer(done.about, Tokenizer.train(told(40), 300), done.folder)
    ids = done.folder / "train.bin"
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train.bin: expected \d+ bytes, found \d+"):
        open_prepared(done.folder)
    Tokenizer.train(told(40), 300).save(done.folder)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        open_prepared(done.folder)
    with pytest.raises(DataError, match="expected what mlx-gpt prepare wrote"):
        open_prepared(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "s.jsonl", told(300))
    code = (
        "import resource, signal, sys; from mlx_gpt.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["prepare", str(file), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert "out: cannot be written (File too large); make room" in run.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["s.jsonl"]


def test_killed_it_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "s.jsonl", told(3000))
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
    assert main(arguments) == 0  # and it does not stand in the way
    assert open_prepared(tmp_path / "out").train.n_tokens


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read from /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_stays_flat_however_long_the_text(kind: str, tmp_path: Path) -> None:
    """Of a text file, and of a record in one line, with another field that is as long."""
    measure = (
        "import re, sys, mlx_gpt.text.prepare as p, mlx_gpt.text.sources as s, mlx_gpt.text.records as r; "
        "from mlx_gpt.cli import main; p.BATCH, s.PIECE, r.LONG = 1 << 18, 1 << 15, 1 << 18; main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    text = " ".join(told(1000)) + "\n"
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
