"""Files are found by name, folder and glob, each once, and used for training or validation by their names."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import the_line
from helpers.text_sources import documents, parts, write

from mlx_gpt.cli import main
from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.text.dataset import load_dataset
from mlx_gpt.text.prepare import prepare_text
from mlx_gpt.text.sources import find_sources, read_text
from mlx_gpt.text.tokenizer import Tokenizer


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
