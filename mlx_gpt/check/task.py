"""The parts of an evaluation task: its definition and result, and the rows of its data file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_gpt import hub
from mlx_gpt.errors import DataError, HubError
from mlx_gpt.text.decoding import Changes, decode_lines
from mlx_gpt.text.records import arrow_records, reader_of, table_rows


@dataclass(frozen=True)
class Evaluation:
    """Metrics over ``n`` scored tokens, passages or questions, and the settings that they depend on."""

    metrics: dict[str, tuple[float, float | None]]  # name: value, standard error
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    changes: str = ""  # by the reading of the data


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


def read_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the place (file and line) and content of each row of a .jsonl or .parquet. ``DataError`` if none."""
    is_table = reader_of(file) is arrow_records
    rows = [(f"{file}, row {n}", row) for n, row in enumerate(table_rows(file), 1)] if is_table else list(_jsonl(file))
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
    for n, line in enumerate(decode_lines(file, Changes()), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {n}: expected a JSON object, found {line[:40]!r}")
        yield f"{file}, line {n}", row
