"""Records of JSON: objects one after another (lines, or indented), an array of them, or an object of columns.

A record may be longer than memory: from ``LONG`` characters on it is parsed incrementally, with the result of
``json.loads``. Each record is an iterable of pieces of its text and must be consumed before the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from mlx_gpt.errors import DataError
from mlx_gpt.files import parse_json, unique_names
from mlx_gpt.text.decoding import Changes, decode

LONG = 1 << 21  # characters of a record that are parsed at once
AHEAD = 1 << 16  # characters of a longer record that are buffered; a number must be shorter
SPACE = re.compile(r"[ \t\r\n]*")
SCALAR = re.compile(r"[-+.\w]*")  # a number, true, false, null
CHARACTERS = re.compile(r'(?:[^"\\]+|\\(?:[^u]|u[0-9a-fA-F]{4}))*')  # of a JSON string
CHATS = {"messages", "conversations", "conversation"}
MAX_NAMES = 20  # that an error lists
PARSE = json.JSONDecoder(object_pairs_hook=unique_names).raw_decode


def json_records(path: Path, field: str, changes: Changes) -> Iterator[Iterable[str]]:
    """Yield the records of a ``.json`` or ``.jsonl`` file. Raises ``DataError`` for one without a text in ``field``."""
    return JSONRecords(path, field, changes).records()


class JSONRecords:
    """Incremental parser of a file of records."""

    def __init__(self, path: Path, field: str, changes: Changes):
        self._path, self._field = path, field
        self._pieces = decode(path, changes)
        self._buffer, self._at = "", 0  # the buffer, and the position in it
        self._line, self._counted = 1, 0  # the number of a line, and where it was counted to in the buffer

    def records(self) -> Iterator[Iterable[str]]:
        """Yield the text of each record in pieces."""
        with self._errors():
            if self._next() == "[":
                for _ in self._items("[", "]"):
                    self._next()
                    yield from self._record()
                if self._next():
                    raise ValueError("text after the array")
            elif self._next():
                yield from self._record(may_be_columns=True)
            while self._next():
                yield from self._record()

    def _record(self, may_be_columns: bool = False) -> Iterator[Iterable[str]]:
        """Yield the text of a value; the texts, if it is an object of columns."""
        self._fill(LONG)
        self._count_lines(self._at)
        try:
            value, end = PARSE(self._buffer, self._at)
        except (ValueError, RecursionError):
            if len(self._buffer) - self._at < LONG:  # the buffer has all of it
                raise
            yield from self._long_record(may_be_columns)
            return
        if isinstance(value, dict):
            if self._field not in value:
                raise DataError(missing(self._place, self._field, list(value)))
            value = value[self._field]
        if may_be_columns and isinstance(value, (list, dict)):
            texts = [_text(text) for text in (value.values() if isinstance(value, dict) else value)]
            self._at = end
            self._end_columns()
            yield from ([text] for text in texts)
        else:
            text = _text(value)
            self._at = end
            yield [text]

    def _long_record(self, may_be_columns: bool) -> Iterator[Iterable[str]]:
        if self._next() == '"':
            yield self._long_text()
            return
        names: list[str] = []
        found = 0
        for name in self._fields():
            if name != self._field:
                names += [name] if len(names) < MAX_NAMES else []
                self._skip()
                continue
            found += 1
            if found > 1:
                raise ValueError(f"duplicate name {name!r}")
            first = self._next()
            if may_be_columns and first in ("[", "{"):
                for _ in self._items("[", "]") if first == "[" else self._fields():
                    yield self._long_text()
            else:
                may_be_columns = False
                yield self._long_text()
        if not found:
            raise DataError(missing(self._place, self._field, names))
        if may_be_columns:
            self._end_columns()

    def _long_text(self) -> Iterator[str]:
        with self._errors():
            if self._next() == '"':
                yield from self._string()
            else:
                _text(self._scalar())

    def _end_columns(self) -> None:
        if self._next():
            raise TypeError(f"its {self._field} is a list or an object")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise ``DataError`` with the place of what is no JSON or has no text."""
        try:
            yield
        except (ValueError, TypeError, RecursionError) as error:
            position = self._at
            if isinstance(error, json.JSONDecodeError) and error.doc is self._buffer:
                position = error.pos
            shown = self._buffer[self._at : self._at + 40].partition("\n")[0] or "the end of the file"
            self._count_lines(len(self._buffer[:position].rstrip()))
            why = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
            raise DataError(
                f'{self._place}: expected {{"{self._field}": "..."}}, found {shown} ({why}); repair or remove it'
            ) from error

    @property
    def _place(self) -> str:
        return f"{self._path}, line {self._line}"

    def _count_lines(self, position: int) -> None:
        if position > self._counted:
            self._line += self._buffer.count("\n", self._counted, position)
            self._counted = position

    def _fields(self) -> Iterator[str]:
        """Yield the name of each field, or its beginning. The caller must consume the value before the next name."""
        length = max(len(self._field), 40) + 1
        for _ in self._items("{", "}"):
            name = reduce(lambda name, piece: (name + piece)[:length], self._string(), "")
            self._expect(":")
            yield name

    def _items(self, begin: str, end: str) -> Iterator[None]:
        """Yield before each item between brackets."""
        self._expect(begin)
        if self._next() != end:
            yield
            while (found := self._next()) != end:
                if found != ",":
                    raise ValueError(f"expected , or {end}")
                self._at += 1
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

    def _fill(self, n: int = 0) -> bool:
        """Fill the buffer to ``n`` characters, or ``AHEAD``; return False at the end of the file."""
        while len(self._buffer) - self._at < (n or AHEAD) and (piece := next(self._pieces, "")):
            self._count_lines(self._at)
            self._buffer, self._counted = self._buffer[self._at :] + piece, self._counted - self._at
            self._at = 0
        return self._at < len(self._buffer)


def missing(place: str, field: str, names: list[str]) -> str:
    """Return the error for a record, or a table, without a text in ``field``."""
    if not CHATS.isdisjoint(names) or {"prompt", "completion"} <= {*names}:
        return (
            f"{place}: expected a text named {field!r}, found a chat ({', '.join(names[:MAX_NAMES])}); GPT-2 has no "
            f"chat format: write each chat as one text, or name a text with --field"
        )
    found = ", ".join(map(repr, names[:MAX_NAMES])) or "nothing"
    return f"{place}: expected a text named {field!r}, found only {found}; name another one with --field"


def _text(value: Any) -> str:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"its text is {json.dumps(value):.40}")
    return value or ""
