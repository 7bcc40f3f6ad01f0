"""Files of many documents: a line of ``.jsonl`` (field ``text``), a row of ``.parquet`` (column ``text``) is one.

Each record comes as the pieces of its text: a line of JSON may be longer than memory, and from ``LONG`` bytes on it is
not read at once, but as it comes. ``json.loads`` would find the same text in it.
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
LONG = 1 << 21  # bytes of a line that are read at once
AHEAD = 1 << 16  # characters of a longer one that are looked at; no number has so many
SPACE = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r"[-+.\w]*")  # a number, true, false, null
CHARACTERS = re.compile(r'(?:[^"\\]+|\\(?:[^u]|u[0-9a-fA-F]{4}))*')  # of a string, as JSON writes them


def json_records(path: Path) -> Iterator[Iterable[str]]:
    """The records of a ``.jsonl`` file, each to be read to its end. ``DataError`` for a line without a text."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONG):
            number += 1
            if line.strip():
                yield _record(file, line, f"{path}, line {number}")


def parquet_records(path: Path) -> Iterator[Iterable[str]]:
    """The records of a ``.parquet`` file. ``DataError`` where it is none, and without pyarrow."""
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
    """A record by the beginning of its line, behind which the file stands."""
    try:
        if len(line) < LONG or line.endswith(b"\n"):
            yield _text(parse_json(line.removeprefix(codecs.BOM_UTF8))[TEXT])
        else:
            yield from LongLine(codecs.iterdecode(_to_its_end(file, line), "utf-8-sig")).text()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f'{place}: expected {{"text": "..."}}, found {line[:40]!r} ({why}); mend or remove it'
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"its text is {value!r:.40}")
    return value or ""


def _to_its_end(file: BinaryIO, line: bytes) -> Iterator[bytes]:
    while line:
        yield line
        line = b"" if line.endswith(b"\n") else file.readline(AHEAD)


class LongLine:
    """An object in JSON, read as it comes. Raises ``ValueError`` where it is none, ``KeyError`` if it has no text."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces = pieces
        self._ahead, self._at = "", 0  # what has been read, and how much of it is behind us

    def text(self) -> Iterator[str]:
        """What the field ``text`` holds, piece by piece."""
        found = 0
        for name in self._fields():
            if name != TEXT:
                self._skip()
                continue
            found += 1
            if found > 1:
                raise ValueError("'text' is there twice")
            if self._next() == '"':
                yield from self._string()
            else:
                _text(self._word())
        if self._next():
            raise ValueError("more follows")
        if not found:
            raise KeyError(TEXT)

    def _fields(self) -> Iterator[str]:
        """The name of each field of an object, or how it begins. Whoever asks for the next has read the value."""
        for _ in self._items("{", "}"):
            name = reduce(lambda name, piece: (name + piece)[: len(TEXT) + 1], self._string(), "")
            self._expect(":")
            yield name

    def _items(self, begin: str, end: str) -> Iterator[None]:
        """Stops before each item between brackets."""
        self._expect(begin)
        if self._next() != end:
            yield
            while self._next() != end:
                self._expect(",")
                yield
        self._expect(end)

    def _skip(self) -> None:
        """Read a value that nobody asks for."""
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
            self._word()

    def _string(self) -> Iterator[str]:
        self._expect('"')
        while True:
            self._look_ahead()
            end = self._match(CHARACTERS)
            text, is_last = parse_json(f'"{self._ahead[self._at : end]}"'), self._ahead[end : end + 1] == '"'
            if "\ud800" <= text[-1:] <= "\udbff" and not is_last:  # half of a pair, of two escapes: wait for the other
                text, end = text[:-1], end - len(r"\ud800")
            if not (text or is_last):
                raise ValueError("it is cut short")
            self._at = end + is_last
            yield text
            if is_last:
                return

    def _word(self) -> Any:
        self._look_ahead()
        start, self._at = self._at, self._match(WORD)
        return parse_json(self._ahead[start : self._at])

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"{character} is missing")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no space; "" at the end."""
        while self._look_ahead():
            self._at = self._match(SPACE)
            if self._at < len(self._ahead):
                return self._ahead[self._at]
        return ""

    def _match(self, pattern: re.Pattern[str]) -> int:
        """Where it ends, of what can be looked at."""
        found = pattern.match(self._ahead, self._at, self._at + AHEAD)
        assert found
        return found.end()

    def _look_ahead(self) -> bool:
        """See to ``AHEAD`` characters, as long as the line has them. Whether there are any."""
        while len(self._ahead) - self._at < AHEAD and (piece := next(self._pieces, "")):
            self._ahead, self._at = self._ahead[self._at :] + piece, 0
        return self._at < len(self._ahead)
