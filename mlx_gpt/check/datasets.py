"""Read the data of evaluation tasks from a file, or fetch the public data set from the hub into its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_gpt import hub
from mlx_gpt.check.task import Task
from mlx_gpt.errors import DataError, HubError


def fetch(task: Task) -> Path:
    """Return the public data set of a task, downloaded once. Raises ``DataError``."""
    try:
        return hub.fetch(task.repository, [task.file], kind="dataset") / task.file
    except HubError as error:
        raise DataError(f"{task.repository}: {error}; or give --data FILE") from error


def read_text(file: Path) -> str:
    """Read a text file, or the rows of a .parquet joined by empty lines, as in transformers' documentation."""
    if file.suffix == ".parquet":
        return "\n\n".join(text_field(row, "text", where) for where, row in rows(file))
    text = _decode(file)
    if not text:
        raise DataError(f"{file}: expected a text, found an empty file")
    return text


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and content of each row of a .jsonl or .parquet. ``DataError`` if none."""
    n = 0
    for where, row in _parquet(file) if file.suffix == ".parquet" else _jsonl(file):
        n += 1
        yield where, row
    if not n:
        raise DataError(f"{file}: expected a JSON object a line, found none")


def text_field(row: dict[str, Any], field: str, where: str) -> str:
    """Return a field of a row. Raises ``DataError`` unless it is a text."""
    if not isinstance(row.get(field), str):
        found = f"{row[field]!r}"[:40] if field in row else f"only {', '.join(map(str, row)) or 'nothing'}"
        raise DataError(f"{where}: expected a text in the field {field!r}, found {found}")
    return row[field]


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, line in enumerate(_decode(file).split("\n"), start=1):
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


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found other bytes at {error.start}") from error
    except OSError as error:
        raise DataError(f"{file}: expected a file to read ({error.strerror})") from error
