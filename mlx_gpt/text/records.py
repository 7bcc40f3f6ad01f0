"""Records of every kind of file: a text file is one record; a line of JSON, a row of a table is one.

A record is an iterable of pieces of its text, to be consumed before the next.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_gpt.errors import DataError
from mlx_gpt.text.decoding import COMPRESSED, REPLACED, Changes, decode, decode_lines, open_bytes
from mlx_gpt.text.json_records import json_records, missing

TEXT = "text"  # the field, and the column
ROWS = 1024  # of a table, in memory at once
JSON_BEGINS = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*"')
Records = Iterator[Iterable[str]]
Reader = Callable[[Path, str, Changes], Records]  # (path, field, changes)


def text_file(path: Path, field: str, changes: Changes) -> Records:
    """Yield a whole text file as one record."""
    yield decode(path, changes)


def csv_records(path: Path, field: str, changes: Changes) -> Records:
    """Yield the column ``field`` of a ``.csv`` or ``.tsv`` file with a header. Raises ``DataError``."""
    csv.field_size_limit(sys.maxsize)
    delimiter, name = ("\t", "tabs") if suffix(path) == ".tsv" else (",", "commas")
    rows = csv.reader(decode_lines(path, changes), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if header.count(field) != 1:
            raise DataError(missing(str(path), field, header))
        column = header.index(field)
        line = rows.line_num + 1  # at which a row begins
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {line}: expected {len(header)} columns, found {len(row)}; quote a field that has "
                    f"{name}, or repair the row"
                )
            if row:
                yield [row[column]]
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {rows.line_num}: expected a table ({error}); repair it, or leave it out"
        ) from error


def arrow_records(path: Path, field: str, changes: Changes) -> Records:
    """Yield the column ``field`` of an Arrow or Parquet file. Raises ``DataError``, also without pyarrow."""
    for batch in _batches(path, field):
        for value in batch.column(0).cast("large_binary").to_pylist():
            text = (value or b"").decode("utf-8", "replace")
            if "\ufffd" in text:
                changes.add(REPLACED, path, text.count("\ufffd") - value.count("\ufffd".encode()))
            yield [text]


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each row of an Arrow or Parquet file, by the names of its columns. Raises ``DataError``."""
    for batch in _batches(path):
        yield from batch.to_pylist()


def _batches(path: Path, field: str | None = None) -> Iterator[Any]:
    """Yield batches of rows, with all columns or with one of text."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading {suffix(path)} needs pyarrow: pip install 'mlx-gpt[parquet]'") from error
    try:
        with open_bytes(path) as opened, _seekable(opened) as stream:
            if stream.read(4) == b"PAR1":
                from pyarrow.parquet import ParquetFile

                table = ParquetFile(stream)
                schema, batches = table.schema_arrow, table.iter_batches(ROWS, columns=field and [field])
            else:
                schema, batches = _open_arrow(stream)
            if field is not None:
                _check_column(path, schema, field)
            for batch in batches:
                yield batch if field is None else batch.select([field])
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: expected a parquet or Arrow file ({reason}); leave it out") from error


def _open_arrow(stream: BinaryIO) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the batches of Arrow's two formats: a file, or a stream."""
    from pyarrow import ipc

    stream.seek(0)
    if stream.read(6) == b"ARROW1":
        table = ipc.open_file(stream)
        return table.schema, map(table.get_batch, range(table.num_record_batches))
    stream.seek(0)
    table = ipc.open_stream(stream)
    return table.schema, table


def _seekable(stream: BinaryIO) -> BinaryIO:
    if isinstance(stream, io.BufferedReader):
        return stream
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


def _check_column(path: Path, schema: Any, field: str) -> None:
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        kind = getattr(kind, "value_type", kind) if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
        return types.is_null(kind) or types.is_binary_view(kind) or any(test(kind) for test in tests)

    if schema.names.count(field) != 1:
        raise DataError(missing(str(path), field, schema.names))
    if not is_text(kind := schema.field(field).type):
        others = ", ".join(column.name for column in schema if is_text(column.type)) or "none"
        raise DataError(f"{path}: expected text in the column {field!r}, found {kind}; columns of text: {others}")


READERS: dict[str, Reader] = {
    ".txt": text_file,
    ".md": text_file,
    ".jsonl": json_records,
    ".ndjson": json_records,
    ".json": json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
    ".parquet": arrow_records,
    ".arrow": arrow_records,
}
SUFFIXES = tuple(READERS)


def suffix(path: Path) -> str:
    """Return the lower-case suffix of a file without that of a compression: ``.jsonl`` for ``A.JSONL.gz``."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if last in COMPRESSED else last


def reader_of(path: Path) -> Reader:
    """Return the reader for a suffix; without one, for what the file begins with. Any other file is plain text."""
    if suffix(path):
        return READERS.get(suffix(path), text_file)
    with open_bytes(path) as stream:
        head = stream.peek(4096)
    if head.startswith((b"PAR1", b"ARROW1")):
        return arrow_records
    return json_records if JSON_BEGINS.match(head) else text_file
