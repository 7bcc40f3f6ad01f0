"""Every format and compression gives the same documents; what has no text is refused with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.text_sources import ONE, ROWS, TWO, documents, parts, write

from mlx_gpt.errors import DataError
from mlx_gpt.text.decoding import _zstd
from mlx_gpt.text.sources import find_sources, read_text
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.tinyworld.stories import generate_stories


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
