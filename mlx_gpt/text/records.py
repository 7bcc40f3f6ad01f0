"""Records of ``.jsonl`` (field ``text``) and ``.parquet`` (column ``text``) files.

Each record is an iterable of pieces of its text. A line of JSON may be longer than memory: from ``LONG`` bytes on it
is parsed incrementally, with the result of ``json.loads``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

from mlx_gpt.errors import DataError
from mlx_gpt.files import parse_json

TEXT = "text"  # the field, and the column
LONG = 1 << 21  # bytes of a line that are parsed at once
AHEAD = 1 << 16  # characters of a longer line that are buffered; a number must be shorter
SPACE = re.compile(r"[ \t\r\n]*")
SCALAR = re.compile(r"[-+.\w]*")  # a number, true, false, null
CHARACTERS = re.compile(r'(?:[^"\\]+|\\(?:[^u]|u[0-9a-fA-F]{4}))*')  # of a JSON string


def json_records(path: Path) -> Iterator[Iterable[str]]:
    """Yield the records of a ``.jsonl`` file; each must be consumed. Raises ``DataError`` for a line without a text."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONG):
            number += 1
            if line.strip():
                yield _record(file, line, f"{path}, line {number}")


def parquet_records(path: Path) -> Iterator[Iterable[str]]:
    """Yield the records of a ``.parquet`` file. Raises ``DataError`` for another file, and without pyarrow."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install 'mlx-gpt[parquet]'") from error
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024, columns=[TEXT]):
            yield from ([text or ""] for text in batch.column(0).to_pylist())
    except (ArrowException, ValueError, IndexError) as error:
        raise DataError(f"{path}: expected a parquet file with a column text ({error}); leave it out") from error


def _record(file: BinaryIO, line: bytes, place: str) -> Iterator[str]:
    """Yield the text of a record, given the beginning of its line; the file is positioned after that."""
    try:
        if len(line) < LONG or line.endswith(b"\n"):
            yield _text(parse_json(line.removeprefix(codecs.BOM_UTF8))[TEXT])
        else:
            yield from LongLine(codecs.iterdecode(_rest_of_line(file, line), "utf-8-sig")).text()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f'{place}: expected {{"text": "..."}}, found {line[:40]!r} ({why}); repair or remove the line'
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"its text is {value!r:.40}")
    return value or ""


def _rest_of_line(file: BinaryIO, line: bytes) -> Iterator[bytes]:
    while line:
        yield line
        line = b"" if line.endswith(b"\n") else file.readline(AHEAD)


class LongLine:
    """Incremental parser of a JSON object. Raises ``ValueError`` for invalid JSON, ``KeyError`` without a text."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces = pieces
        self._buffer, self._at = "", 0  # the buffer, and the position in it

    def text(self) -> Iterator[str]:
        """Yield the value of the field ``text`` in pieces."""
        found = 0
        for name in self._fields():
            if name != TEXT:
                self._skip()
                continue
            found += 1
            if found > 1:
                raise ValueError("duplicate field 'text'")
            if self._next() == '"':
                yield from self._string()
            else:
                _text(self._scalar())
        if self._next():
            raise ValueError("text after the object")
        if not found:
            raise KeyError(TEXT)

    def _fields(self) -> Iterator[str]:
        """Yield the name of each field, or its beginning. The caller must consume the value before the next name."""
        for _ in self._items("{", "}"):
            name = reduce(lambda name, piece: (name + piece)[: len(TEXT) + 1], self._string(), "")
            self._expect(":")
            yield name

    def _items(self, begin: str, end: str) -> Iterator[None]:
        """Yield before each item between brackets."""
        self._expect(begin)
        if self._next() != end:
            yield
            while self._next() != end:
                self._expect(",")
                yield
        self._expect(end)

    def _skip(self) -> None:
        """Skip a value."""
        first = self._next()
        if first == '"':
            for _ in self._string():
                pass
        elif first == "{":
            for _ in self._fields():
                self._skip()
        elif first == "[":
            for _ in self._items("[", "]"):
                self._skip()
        else:
            self._scalar()

    def _string(self) -> Iterator[str]:
        self._expect('"')
        while True:
            self._fill()
            end = self._match(CHARACTERS)
            text, is_last = parse_json(f'"{self._buffer[self._at : end]}"'), self._buffer[end : end + 1] == '"'
            if "\ud800" <= text[-1:] <= "\udbff" and not is_last:  # half of a surrogate pair: wait for the other
                text, end = text[:-1], end - len(r"\ud800")
            if not (text or is_last):
                raise ValueError("unterminated string")
            self._at = end + is_last
            yield text
            if is_last:
                return

    def _scalar(self) -> Any:
        self._fill()
        start, self._at = self._at, self._match(SCALAR)
        return parse_json(self._buffer[start : self._at])

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"expected {character}")
        self._at += 1

    def _next(self) -> str:
        """Skip white space and return the next character; "" at the end."""
        while self._fill():
            self._at = self._match(SPACE)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
        return ""

    def _match(self, pattern: re.Pattern[str]) -> int:
        """Return the end of a match within the buffer."""
        found = pattern.match(self._buffer, self._at, self._at + AHEAD)
        assert found
        return found.end()

    def _fill(self) -> bool:
        """Fill the buffer to ``AHEAD`` characters; return False at the end of the line."""
        while len(self._buffer) - self._at < AHEAD and (piece := next(self._pieces, "")):
            self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return self._at < len(self._buffer)
