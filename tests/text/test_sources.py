"""Text is read by one set of rules whatever file, folder or pipe it comes from, and every change is reported."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TINY, the_line

from mlx_gpt.cli import main
from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.text import prepare as prepare_module
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.decoding import _zstd
from mlx_gpt.text.find import TRAIN, TextFile
from mlx_gpt.text.prepare import open_prepared, prepare_cached, prepare_text
from mlx_gpt.text.sources import Sources, find_sources, read_text
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld.stories import generate_stories

ONE, TWO = "one naïve line\nand another", "two 漢字"
ROWS = [{"id": 1, "text": ONE}, {"id": 2, "text": TWO}]


def documents(sources: Sources) -> list[str]:
    """The documents of all files, without a split."""
    sources.files = [TextFile(file.path, TRAIN) for file in sources.files]
    found: list[str] = []
    for piece in sources.pieces():
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    return found


def parts(sources: Sources) -> tuple[str, str]:
    """The text for training, and that for validation."""
    pieces = list(sources.pieces())
    train, val = ("|".join(piece.text for piece in pieces if piece.val is val) for val in (False, True))
    return train, val


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Encodings and line ends


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


# Formats and compression


def as_csv(rows: list[dict[str, Any]]) -> str:
    return "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows)


FORMATS: dict[str, str] = {
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)),
    "lines.NDJSON": "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS),
    "array.jsonl": json.dumps(ROWS, indent=2),
    "indented.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "texts.json": json.dumps([ONE, TWO]),
    "columns.json": json.dumps({"id": [1, 2], "text": [ONE, TWO]}),
    "pandas.json": json.dumps({"id": {"0": 1, "1": 2}, "text": {"0": ONE, "1": TWO}}),
    "table.csv": as_csv(ROWS),
    "table.tsv": as_csv(ROWS).replace(",", "\t"),
    "marks.txt": ONE + EOT + "\n" + TWO,
    "nosuffix": "\n".join(map(json.dumps, ROWS)),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".ZST": lambda data: _zstd().compress(data),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_documents_compressed_or_not(name: str, compression: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"{name}{compression}", COMPRESSIONS[compression](FORMATS[name].encode()))
    sources = find_sources([str(file)])
    assert documents(sources) == [ONE, TWO]
    if name != "nosuffix":
        assert [each.path for each in find_sources([str(tmp_path)]).files] == [file]


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "columns.json", "pandas.json", "indented.json"])
def test_json_longer_than_memory_has_the_same_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("mlx_gpt.text.json_records.LONG", "mlx_gpt.text.json_records.AHEAD", "mlx_gpt.text.decoding.PIECE"):
        monkeypatch.setattr(size, 12)
    assert documents(find_sources([str(write(tmp_path / name, FORMATS[name]))])) == [ONE, TWO]


def test_a_compressed_text_is_split_like_the_plain_one(tmp_path: Path) -> None:
    text = "\r\n".join(generate_stories(50, seed=0))
    plain = parts(find_sources([str(write(tmp_path / "a.txt", text.replace("\r\n", "\n")))]))
    assert plain[1]
    for name, content in {"b.txt.gz": gzip.compress(text.encode()), "c.txt": text.encode("utf-16")}.items():
        assert parts(find_sources([str(write(tmp_path / name, content))])) == plain


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_compressed_data_that_is_cut_short_is_refused(compression: str, tmp_path: Path) -> None:
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: _zstd().compress(data)}[compression]
    file = write(tmp_path / f"a.txt{compression}", compress(os.urandom(999).hex().encode())[:-30])
    for use in (lambda: documents(find_sources([str(file)])), lambda: find_sources([str(file)]).n_bytes):
        with pytest.raises(DataError, match=r"a.txt.* damaged or cut short"):
            use()


REFUSED = [
    ("a.jsonl", '{"text": "a"}\n{"text": "b\n', r'a.jsonl, line 2: expected {"text": "..."}, found {"text": "b \('),
    ("a.jsonl", '{"text": "a"}\n\n{"text": 5}\n', r"a.jsonl, line 3: .*its text is 5"),
    ("a.jsonl", '{"text": ["a", "b"]}\n{"text": ["c"]}\n', r"a.jsonl, line 1: .*its text is a list"),
    ("a.json", '[{"text": "a"},\n {"text": "b"}\n', r"a.json, line 2: .*expected ,"),
    (
        "a.json",
        '{"content": "a", "id": 1}',
        r"line 1: expected a text named 'text', found only 'content', 'id'; .*--field",
    ),
    ("a.jsonl", '{"messages": []}', r"found a chat \(messages\); GPT-2 has no chat format"),
    ("a.jsonl", '{"prompt": "a", "completion": "b"}', r"found a chat \(prompt, completion\)"),
    ("a.csv", "id,content\n1,a\n", r"a.csv: expected a text named 'text', found only 'id', 'content'"),
    ("a.csv", 'id,text\n1,"a\n', r"a.csv, line 2: expected a table"),
    ("a.csv", "id,text\n1,a\n2\n", r"a.csv, line 3: expected 2 columns, found 1; quote a field that has commas"),
    ("a.csv", 'text,id\n"a\nb",1\n\nhello, my friend, 2\n', r"a.csv, line 5: expected 2 columns, found 3; quote"),
    ("a.csv", "text\nhello, my friend\n", r"a.csv, line 2: expected 1 columns, found 2; quote"),
    ("a.csv", "text,id,note\na,1\n", r"a.csv, line 2: expected 3 columns, found 2; quote"),
    ("a.tsv", "text\tid\na\tb\t1\n", r"a.tsv, line 2: expected 2 columns, found 3; quote a field that has tabs"),
    ("a.parquet", "PAR1 and nothing", r"a.parquet: expected a parquet or Arrow file"),
    ("a.arrow", "nothing", r"a.arrow: expected a parquet or Arrow file"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_has_no_text_is_refused_in_one_line_with_its_place(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    file = write(tmp_path / name, content)
    for read in (lambda: documents(find_sources([str(file)])), lambda: read_text(file)):
        with pytest.raises(DataError, match=message) as refused:
            read()
        assert "\n" not in str(refused.value)
        assert str(refused.value).count("line ") <= 1


def test_another_field_or_column_is_named(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"body": "it", "text": 3}'), ("a.csv", "id,body\n1,it\n")):
        assert documents(find_sources([str(write(tmp_path / name, content))], text_field="body")) == ["it"]


def arrow_columns() -> dict[str, Any]:
    import pyarrow as pa

    texts = [ONE, None, TWO]
    kinds = (pa.string(), pa.large_string(), pa.string_view())
    columns = {str(kind): pa.array(texts, kind) for kind in kinds}
    columns |= {"binary": pa.array([text and text.encode() for text in texts], pa.binary())}
    return columns | {"dictionary": pa.array(texts).dictionary_encode(), "null": pa.nulls(3)}


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary", "null"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_arrow_columns_of_text_are_read_whatever_their_type(suffix: str, kind: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = pa.table({"text": arrow_columns()[kind]})
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, file)
        write(tmp_path / "b.parquet.gz", gzip.compress(file.read_bytes()))
    else:
        feather.write_feather(table, str(file), compression="uncompressed")
        with pa.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as stream:
            stream.write_table(table)
    for each in tmp_path.iterdir():
        sources = find_sources([str(each)])
        assert documents(sources) == ([] if kind == "null" else [ONE, TWO])
        assert sources.changes == f"{3 if kind == 'null' else 1} empty documents were left out ({each.name})"


@pytest.mark.parametrize("column", [[["a"]], [1], [1.5], [{"a": "b"}], [True]])
def test_arrow_columns_of_other_types_are_refused_with_those_of_text(column: list[Any], tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": column, "body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet: expected text in the column 'text', found .*; columns of text: body"
    ):
        documents(find_sources([str(tmp_path / "a.parquet")]))


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


# Names


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "a.txt", "a")
    write(tmp_path / "d" / "b.txt", "b")
    (tmp_path / "d" / "soft.txt").symlink_to("a.txt")
    os.link(tmp_path / "d" / "b.txt", tmp_path / "hard.txt")
    monkeypatch.chdir(tmp_path)
    sources = find_sources(["d", str(tmp_path / "d" / "*.txt"), "d/../d/a.txt", "hard.txt"])
    assert documents(sources) == ["a", "b"]
    assert sources.changes == "named twice, it counts once (soft.txt, a.txt, b.txt and 1 more)"


LAYOUTS = [
    {"train.jsonl": "train", "valid.jsonl": "val", "test.jsonl": "", "README.md": ""},
    {"train.txt": "train", "val.txt": "val"},
    {"training.json": "train", "dev.json": "val"},
    {"train-00000-of-00002.csv": "train", "train-00001-of-00002.csv": "train", "validation-00000-of-00001.csv": "val"},
    {"TinyStoriesV2-GPT4-train.txt": "train", "TinyStoriesV2-GPT4-valid.txt": "val"},
    {"train/1.txt": "train", "train/2.txt": "train", "Validation/3.txt": "val", "test/4.txt": "", "notes.txt": ""},
    {"data/train.jsonl.gz": "train", "data/test.jsonl.gz": "", "dataset_info.json": ""},
    {"train_en.jsonl": "train", "valid_en.jsonl": "val", "test_en.jsonl": ""},
    {"train_0.csv": "train", "train_1.csv": "train", "test_0.csv": "", "eval-0011223344556677.csv": "val"},
    {"en.train.txt": "train", "en.dev.txt": "val", "fr.train.txt": "train"},
    {"train.txt": "train", "other.txt": "train"},
    {"night_train.txt": "train", "bus_test.txt": "train"},
    {"test.txt": "train", "other.txt": "train"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout))
@pytest.mark.parametrize("named", ["folder", "glob"])
def test_files_for_training_validation_and_test_are_used_as_such(
    named: str, layout: dict[str, str], tmp_path: Path
) -> None:
    for name in layout:
        text = f"text of {name} " * 9
        kind = next(kind for kind in (".txt", ".md", ".csv", ".json") if kind in name)
        content = {".csv": f"text\n{text}\n", ".json": json.dumps({"text": text})}.get(kind, text)
        write(tmp_path / "d" / name, gzip.compress(content.encode()) if name.endswith(".gz") else content)
    sources = find_sources([str(tmp_path / "d") if named == "folder" else str(tmp_path / "d" / "**" / "*.*")])
    train, val = parts(sources)
    has_val = "val" in layout.values()
    for name, part in layout.items():
        found = (f"of {name}" in train, f"of {name}" in val)
        if has_val or not part:
            assert found == (part == "train", part == "val"), name
        else:
            assert any(found), name
        assert (Path(name).name in sources.changes) == (not part), name


def test_val_data_is_for_validation_only(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.txt", name)
    assert parts(find_sources([str(tmp_path / "a.txt")], val_data=str(tmp_path / "b.txt"))) == ("a", "b")
    overlapping = find_sources([str(tmp_path)], val_data=str(tmp_path / "b.txt"))
    assert parts(overlapping) == ("a|c", "b")
    assert overlapping.changes == "for validation too, left out of training (b.txt)"
    with pytest.raises(UsageError, match="is the training text too"):
        find_sources([str(tmp_path / "a.txt")], val_data=str(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.txt", b"one\ntwo"),
        ("b.txt.gz", gzip.compress(b"one\ntwo")),
        ("b.txt", b"one\r\ntwo"),
        ("b.txt", "one\ntwo".encode("utf-16")),
        ("b.jsonl", b'{"text": "one\\ntwo"}'),
    ],
)
def test_a_copy_of_another_text_is_reported_whatever_its_format(name: str, content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\ntwo")
    sources = find_sources([str(tmp_path / "a.txt")], val_data=str(write(tmp_path / name, content)))
    for _ in range(2):
        assert parts(sources) == ("one\ntwo", "one\ntwo")
        assert f"the same text as another file ({name})" in sources.changes


def test_empty_files_are_no_copies(tmp_path: Path) -> None:
    files = [str(write(tmp_path / name, "")) for name in ("a.txt", "b.txt")]
    sources = find_sources(files)
    assert parts(sources) == ("", "")
    assert "the same text" not in sources.changes


def test_a_setting_without_effect_is_refused(tmp_path: Path) -> None:
    text, val = (str(write(tmp_path / name, name)) for name in ("a.txt", "b.txt"))
    with pytest.raises(UsageError, match="--field body: text has no fields"):
        find_sources([text], text_field="body")
    with pytest.raises(UsageError, match="--field body: text has no fields"):
        read_text(text, "body")
    with pytest.raises(UsageError, match=r"--val-fraction 0.5: there are files for validation"):
        find_sources([text], 0.5, val_data=val)
    for flags in ({"val_data": val}, {"text_field": "body"}):
        with pytest.raises(UsageError, match="leave it out"):
            load_dataset("tinyworld", "bytes", **flags)


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    sources = find_sources([str(write(tmp_path / "a\x1b[31m.txt", b"caf\xe9"))])
    documents(sources)
    assert "a\\x1b[31m.txt" in sources.changes


def test_files_without_text_in_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "settings.json", '{"lr": 3}')
    (tmp_path / "dead.txt").symlink_to("nowhere")
    for name in ("config.json", "vocab.json", "merges.txt"):
        write(tmp_path / "model" / name, '{"a": 1}')
    sources = find_sources([str(tmp_path)])
    assert documents(sources) == ["a"]
    assert all(name in sources.changes for name in ("settings.json", "dead.txt", "model"))


def test_other_files_in_a_folder_are_counted_and_their_suffixes_named(tmp_path: Path) -> None:
    for name in ("d/a.txt", "d/b.py", "d/sub/c.PY", "d/LICENSE", "d/.hidden", "e/v.txt", "e/w.png.gz"):
        write(tmp_path / name, f"text of {name}")
    left = "3 other files of a folder were left out; name them to read them as text (LICENSE, .py)"
    assert find_sources([str(tmp_path / "d")]).changes == left
    assert find_sources([str(tmp_path / "d" / "a.txt")]).changes == ""
    with_val = find_sources([str(tmp_path / "d" / "a.txt")], val_data=str(tmp_path / "e"))
    assert with_val.changes == "1 other files of a folder were left out; name them to read them as text (.png)"
    everything = find_sources([str(tmp_path / "d" / "**")])
    assert [file.path.name for file in everything.files] == ["LICENSE", "a.txt", "b.py", "c.PY"]
    assert everything.changes == ""


def test_a_model_folder_a_prepared_folder_and_an_empty_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "some text " * 99)
    prepare_text(find_sources([str(tmp_path / "a.txt")]), "bytes", tmp_path / "ids")
    Tokenizer.bytes().save(tmp_path / "model")
    for name, message in (
        ("ids", "found a folder that mlx-gpt prepare wrote"),
        ("model", "found a model folder"),
        ("model/merges.txt", "found a file of the model folder"),
        ("model/*.json", "found a file of the model folder"),
    ):
        with pytest.raises(DataError, match=message):
            find_sources([str(tmp_path / name)])


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--data", "", "--out", "r"],
        ["train", "--data", "a.txt", "--val-data", " ", "--out", "r", "--tokenizer", "bytes"],
        ["train", "--data", "a.txt", "--field", "", "--out", "r", "--tokenizer", "bytes"],
        ["prepare", "", "--out", "p"],
        ["eval", "nowhere", "--task", "perplexity", "--data", ""],
        ["generate", "nowhere", "--prompt-file", ""],
    ],
)
def test_an_empty_name_is_refused(command: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "some text " * 99)
    assert main(command) in (1, 2)
    assert "expected the name of" in the_line(capsys.readouterr().err) or command[0] == "generate"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prepare", "", "--out", "p"], "^'': expected the name of"),
        (["prepare", "a.txt", "--val-data", "", "--out", "p"], "--val-data '': expected the name of"),
        (["eval", "nowhere", "--task", "perplexity", "--data", ""], "^'': expected the name of"),
        (["train", "--data", "", "--tokenizer", "bytes", "--out", "r"], "--data '': expected the name of"),
        (
            ["prepare", "a.txt", "--val-data", "-", "--tokenizer", "bytes", "--out", "p"],
            "a.txt, -: expected text for training and for",
        ),
        (["prepare", "a.txt", "--tokenizer", "bpe:99999999", "--out", "p"], "^unknown tokenizer 'bpe:99999999'; "),
        (["prepare", "a.txt", "--tokenizer", "bpe:99999999", "--out", "p"], "N ids from 257 to 9,999,999"),
        (["prepare", "a.txt", "--tokenizer", "bpe:2", "--out", "p"], "^a vocabulary needs at least 257 ids"),
        (
            ["prepare", "a.json", "--tokenizer", "bytes", "--out", "p"],
            "a.json, line 1: expected .* found the end of the file .expected , or ]",
        ),
    ],
)
def test_a_message_names_what_the_user_gave(
    command: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "some text " * 99)
    write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(command) in (1, 2)
    assert re.search(message, the_line(capsys.readouterr().err))


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
    [ONE + EOT + TWO, FORMATS["lines.jsonl"], gzip.compress(FORMATS["array.json"].encode())],
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
