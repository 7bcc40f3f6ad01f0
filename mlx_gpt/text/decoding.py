"""Decode files to text, compressed or not, in UTF-8, UTF-16 or UTF-32. The rules are those of ``sources``."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import stat
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_gpt.errors import DataError, one_line

PIECE = 1 << 18  # characters read at a time
MAX_INVALID = 0.1  # bytes that do not decode, per character; above it a file is not text
FEW_INVALID = 16  # bytes that may be replaced in any file
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MARKS = {  # that of UTF-16 begins that of UTF-32, which therefore comes first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}

REPLACED = "bytes were not UTF-8 and were replaced by U+FFFD"
EMPTY = "empty documents were left out"
MARK = "a byte order mark was dropped"
OTHERS = "other files of a folder were left out; name them to read them as text"
LINE_ENDS = r"the line ends \r\n and \r became \n"


class Changes:
    """Changes that reading made to a text and what it left out. ``str`` gives one line, "" without any."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, change: str, path: Path, n: int = 1) -> None:
        """Count a change, a phrase, in a file."""
        if n:
            self._found[change][path.name] += n

    def count(self, change: str) -> int:
        """Return how often a change was made in all files."""
        return sum(self._found[change].values())

    def __str__(self) -> str:
        return one_line("; ".join(self._phrase(change, [*files]) for change, files in self._found.items() if files))

    def _phrase(self, change: str, files: list[str]) -> str:
        number = f"{self.count(change):,} " if change in (REPLACED, EMPTY, OTHERS) else ""
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        return f"{number}{change} ({', '.join(files[:3])}{more})"


def decode(path: Path, changes: Changes) -> Iterator[str]:
    """Yield the text of a file in pieces. Raises ``DataError`` for a file that is not text, else ``OSError``."""
    errors = f"mlx_gpt.{id(changes)}"
    codecs.register_error(errors, lambda error: _replace(error, path, changes))
    replaced_before, size, line = changes.count(REPLACED), 0, 1
    with open_bytes(path) as stream:
        head = stream.peek(4)[:4]
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
        changes.add(MARK, path, bool(encoding))
        with io.TextIOWrapper(stream, encoding or "utf-8", errors, newline=None) as reader:
            while text := reader.read(PIECE):
                if "\0" in text:
                    line += text.count("\n", 0, text.index("\0"))
                    raise DataError(
                        f"{path}: expected text, found a binary file (it has zero bytes, the first in line {line:,}); "
                        f"leave it out, or remove them"
                    )
                size, line = size + len(text), line + text.count("\n")
                yield text
            changes.add(LINE_ENDS, path, reader.newlines not in (None, "\n"))
    invalid = changes.count(REPLACED) - replaced_before
    if invalid > max(FEW_INVALID, MAX_INVALID * size):
        raise DataError(
            f"{path}: expected UTF-8 text, but {invalid:,} bytes are not, for {size:,} characters; convert it, as with "
            f"iconv, or leave it out"
        )


def decode_lines(path: Path, changes: Changes) -> Iterator[str]:
    """Yield the lines of a text file with their ends. Raises like ``decode``."""
    rest = ""
    for text in decode(path, changes):
        *lines, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def decoded_size(path: Path) -> int:
    """Return the bytes of a file's text in UTF-8, counted only where the size of the file may be another."""
    with open_bytes(path) as stream:
        head = stream.peek(PIECE)
        is_plain = type(stream) is io.BufferedReader and not head.startswith((*MARKS,)) and b"\r" not in head
        if is_plain and (size := path.stat().st_size):  # 0: also that of a file of the system, whatever its text
            return size
    return sum(len(text.encode()) for text in decode(path, Changes()))


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """Open a regular file to read its bytes, decompressed. The stream has ``peek``.

    Raises ``DataError`` for a pipe or a device, which may never end, and for damaged data.
    """
    with _refuse_damage(path), _open(path) as stream:
        yield stream


def _open(path: Path) -> Any:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise DataError(f"{path}: expected a file, found {kind}; give a file, or the text as standard input (-)")
    with path.open("rb") as stream:
        head = stream.read(10)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd().open(path)
    return path.open("rb")


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


@contextmanager
def _refuse_damage(path: Path) -> Iterator[None]:
    """Raise ``DataError`` for compressed data that is damaged or cut short."""
    try:
        yield
    except Exception as error:
        kinds = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
        if not (isinstance(error, kinds) or type(error).__name__ == "ZstdError"):
            raise
        raise DataError(f"{path}: the compressed data is damaged or cut short ({error}); make it again") from error


def _replace(error: UnicodeError, path: Path, changes: Changes) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    changes.add(REPLACED, path, error.end - error.start)
    return "\ufffd", error.end
