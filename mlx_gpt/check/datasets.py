"""The sets that models are measured on: read from a file, or fetched from the Hugging Face hub into its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_gpt import hub
from mlx_gpt.check.hellaswag import Question, question
from mlx_gpt.errors import DataError, HubError

# Repository and file: what transformers' docs and lm-evaluation-harness measure on.
PUBLIC = {
    "perplexity": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "lambada": ("EleutherAI/lambada_openai", "data/lambada_test_en.jsonl"),
    "hellaswag": ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet"),
}


def fetch(task: str) -> Path:
    """The public set of a task, downloaded once. Raises ``DataError``."""
    repository, name = PUBLIC[task]
    try:
        return hub.fetch(repository, [name], kind="dataset") / name
    except HubError as error:
        raise DataError(f"{repository}: {error}; or give --data FILE") from error


def read_text(file: Path) -> str:
    """A text file as it is; the rows of a .parquet, joined by empty lines as transformers' docs do."""
    if file.suffix == ".parquet":
        return "\n\n".join(_text(row, "text", where) for where, row in rows(file))
    text = _decoded(file)
    if not text:
        raise DataError(f"{file}: expected a text, found an empty file")
    return text


def read_passages(file: Path) -> list[tuple[str, str]]:
    """LAMBADA: where each stands, and its text."""
    return [(where, _text(row, "text", where)) for where, row in rows(file)]


def read_questions(file: Path) -> list[Question]:
    """HellaSwag, with the fields of the public set."""
    return [_question(row, where) for where, row in rows(file)]


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a .jsonl or .parquet file stands, and the row. Raises ``DataError`` if there is none."""
    n = 0
    for where, row in _parquet(file) if file.suffix == ".parquet" else _jsonl(file):
        n += 1
        yield where, row
    if not n:
        raise DataError(f"{file}: expected a JSON object a line, found none")


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {n}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected a JSON object, found {line[:40]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {line[:40]!r}")
        yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: reading .parquet needs pyarrow; pip install 'mlx-gpt[parquet]'") from error
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected a parquet file ({str(error).splitlines()[0]})") from error
    for n, row in enumerate(table.to_pylist(), start=1):
        yield f"{file}, row {n}", row


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found other bytes at {error.start}") from error
    except OSError as error:
        raise DataError(f"{file}: expected a file to read ({error.strerror})") from error


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(row.get(field), str):
        found = f"{row[field]!r}"[:40] if field in row else f"only {', '.join(map(str, row)) or 'nothing'}"
        raise DataError(f"{where}: expected a text in the field {field!r}, found {found}")
    return row[field]


def _question(row: dict[str, Any], where: str) -> Question:
    activity, ctx_a, ctx_b = (_text(row, field, where) for field in ("activity_label", "ctx_a", "ctx_b"))
    endings, label = row.get("endings"), row.get("label")
    if not (isinstance(endings, list) and len(endings) > 1 and all(isinstance(one, str) and one for one in endings)):
        raise DataError(f"{where}: expected a list of texts in the field 'endings', found {endings!r:.40}")
    if str(label) not in map(str, range(len(endings))):
        raise DataError(f"{where}: expected a 'label' from 0 to {len(endings) - 1}, found {label!r}")
    one = question(activity, ctx_a, ctx_b, endings, int(str(label)), where)
    if not all(one.endings):
        raise DataError(f"{where}: an ending holds nothing but marks in brackets")
    return one
