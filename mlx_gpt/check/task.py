"""The parts of an evaluation task: its definition and result, and readers of data files (text, .jsonl, .parquet)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_gpt import hub
from mlx_gpt.errors import DataError, HubError


@dataclass(frozen=True)
class Evaluation:
    """Metrics over ``n`` scored tokens, passages or questions, and the settings that they depend on."""

    metrics: dict[str, tuple[float, float | None]]  # name: value, standard error
    n: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An evaluation. To add one, write a file like ``lambada.py`` and enter it in ``evaluate.TASKS``."""

    repository: str  # of the public data set, on the hub
    file: str  # in that repository
    measure: Callable[..., Evaluation]  # (model, tokenizer, data file, on_scored, **settings)
    settings: tuple[str, ...] = ()  # the names of the flags that ``measure`` takes

    def fetch(self) -> Path:
        """Return the public data set, downloaded once into the hub's cache. Raises ``DataError``."""
        try:
            return hub.fetch(self.repository, [self.file], kind="dataset") / self.file
        except HubError as error:
            raise DataError(f"{self.repository}: {error}; or give --data FILE") from error


def read_text(file: Path) -> str:
    """Read a text file, or the rows of a .parquet joined by empty lines, as in transformers' documentation."""
    if file.suffix == ".parquet":
        return "\n\n".join(text_field(row, "text", where) for where, row in read_rows(file))
    text = _decode(file)
    if not text:
        raise DataError(f"{file}: expected a text, found an empty file")
    return text


def read_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the place (file and line) and content of each row of a .jsonl or .parquet. ``DataError`` if none."""
    rows = list(_parquet(file) if file.suffix == ".parquet" else _jsonl(file))
    if not rows:
        raise DataError(f"{file}: expected a JSON object a line, found none")
    return rows


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
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {n}: expected a JSON object, found {line[:40]!r}")
        yield f"{file}, line {n}", row


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
