"""Stream text from files, folders, globs and named corpora, in pieces that fit in memory.

A document is a ``.txt`` or ``.md`` file, or a part of it between two ``<|endoftext|>``; a line of ``.jsonl`` (field
``text``); or a row of ``.parquet`` (column ``text``).
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.text.corpora import CORPORA, FileCorpus
from mlx_gpt.text.records import json_records, parquet_records
from mlx_gpt.text.split import VAL_FRACTION, is_val_record, split_files
from mlx_gpt.text.vocab_files import EOT

RECORD_FILES = {".jsonl": json_records, ".parquet": parquet_records}
SUFFIXES = (".txt", ".md", *RECORD_FILES)
PIECE = 1 << 18  # bytes read at a time
MAX_INVALID = 0.1  # share of bytes that are not UTF-8; above it a file is not text
# A text may be cut here without changing its tokens: before a single white space that a character follows. GPT-2's
# pattern joins such a space to that character, or to nothing, never to the text before it. Unicode's other white
# space, of two and three bytes, is not such a character.
SEAM = re.compile(
    rb"(?<=[^\0- \x7f])[ \n](?=[^\0- \x7f])"
    rb"(?!\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
)


@dataclass(frozen=True)
class TextPiece:
    """A piece of text; ``starts`` if it begins a document, ``val`` if it is for validation."""

    text: str
    starts: bool
    val: bool


@dataclass
class Sources:
    """Files to read, and results of reading them. ``pieces`` may be called more than once."""

    files: list[Path]
    val_fraction: float
    seed: int  # of the split
    hashes: dict[str, str] = field(default_factory=dict)  # file -> sha256, of those read to the end
    replaced: int = 0  # bytes that are not UTF-8, replaced by U+FFFD

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"the validation fraction must be between 0 and 1, not {self.val_fraction:g}")

    @property
    def n_bytes(self) -> int:
        """The size of all files in bytes; a missing file counts 0."""
        return sum(file.stat().st_size for file in self.files if file.exists())

    def pieces(self) -> Iterator[TextPiece]:
        """Yield all the text, file by file. Raises ``DataError`` for a file that is not text, missing, or changing."""
        self.replaced = 0
        val_starts = self._split()
        for number, path in enumerate(self.files):
            try:
                before = _stamp(path)
                if read := RECORD_FILES.get(_suffix(path)):
                    yield from self._records(number, read(path), path)
                else:
                    yield from self._text(path, val_starts.get(number))
                if _stamp(path) != before:
                    raise DataError(f"{path}: changed while it was read; try again when no program writes to it")
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error.strerror or error}); restore it, or leave it out"
                ) from error

    def _split(self) -> dict[int, int]:
        try:
            sizes = {i: path.stat().st_size for i, path in enumerate(self.files) if _suffix(path) not in RECORD_FILES}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); leave it out") from error
        return split_files(sizes, self.val_fraction, self.seed)

    def _text(self, path: Path, val_start: int | None) -> Iterator[TextPiece]:
        """Yield the pieces of a text file; validation begins at the last seam before byte ``val_start``."""
        sha, rest, position, replaced_before = hashlib.sha256(), b"", 0, self.replaced
        starts, val = True, val_start == 0
        with path.open("rb") as file:
            while data := file.read(PIECE):
                sha.update(data)
                if not position and b"\0" in data[:8192]:
                    raise DataError(f"{path}: expected text, found a binary file (it has zero bytes); leave it out")
                position += len(data)
                rest += data
                if val_start and not val and position >= val_start:
                    train, rest = _cut(rest, len(rest) - (position - val_start), force=True)
                    yield from self._documents(train, starts, val)
                    starts, val = True, True
                text, rest = _cut(rest, len(rest) - 256)  # the last bytes may be part of a character or word
                starts = yield from self._documents(text, starts, val)
        yield from self._documents(rest, starts, val)
        invalid = self.replaced - replaced_before
        if invalid > MAX_INVALID * max(position, 1):
            raise DataError(f"{path}: expected UTF-8 text, but {invalid} of {position} bytes are not; leave it out")
        self.hashes[str(path)] = sha.hexdigest()

    def _documents(self, data: bytes, starts: bool, val: bool) -> Generator[TextPiece, None, bool]:
        """Yield the documents in a section of a file; return True if the next section starts another one."""
        text = data.decode("utf-8", errors="replace")
        self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        if starts:
            text = text.removeprefix("\ufeff")
        for i, part in enumerate(text.replace("\r\n", "\n").split(EOT)):
            starts = starts or i > 0
            part = part.lstrip("\n") if i else part
            if part:
                yield TextPiece(part, starts, val)
                starts = False
        return starts

    def _records(self, number: int, records: Iterator[Iterable[str]], path: Path) -> Iterator[TextPiece]:
        for i, pieces in enumerate(records):
            val = is_val_record(number, i, self.val_fraction, self.seed)
            for j, part in enumerate(_repack(pieces)):
                yield TextPiece(part, j == 0, val)
        self.hashes[str(path)] = sha256_of(path)


def find_sources(names: Sequence[str], val_fraction: float = VAL_FRACTION, seed: int = 0) -> Sources:
    """Find the files of each name: a file, a folder, a glob or a named corpus. Raises ``DataError`` for no files."""
    return Sources([file for name in names for file in _files(name)], val_fraction, seed)


def _files(name: str) -> list[Path]:
    corpus = CORPORA.get(name)
    if isinstance(corpus, FileCorpus):
        return [corpus.open()]
    path = Path(name).expanduser()
    if path.is_dir():
        below = sorted(file.relative_to(path) for file in path.rglob("*"))
        visible = [file for file in below if not any(part.startswith(".") for part in file.parts)]
        found = [path / file for file in visible if _suffix(file) in SUFFIXES and (path / file).is_file()]
    else:
        found = [path] if path.exists() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    if not found and corpus:
        raise DataError(f"{name}: generated in memory, it needs no preparation: mlx-gpt train --data {name}")
    if not found:
        raise DataError(
            f"{name}: expected text, found no such file, folder or glob, or no {', '.join(SUFFIXES)} files in it; "
            f"named corpora are {', '.join(CORPORA)}"
        )
    return found


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _cut(data: bytes, target: int, force: bool = False) -> tuple[bytes, bytes]:
    """Cut at the last seam before ``target``. Without a seam cut nothing off, or at a character if ``force``."""
    first = max(0, target - 4096)
    found = (seam.start() for seam in SEAM.finditer(data, first, max(0, target + 4)))  # SEAM looks 4 bytes ahead
    seams = [start for start in found if start <= target]
    at = seams[-1] if seams else 0
    if not seams and (force or len(data) > 8 * PIECE):
        at = target
        while target - 3 < at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
            at -= 1
        at -= data[max(0, at - 1) : at + 1] == b"\r\n"
    return data[:at], data[at:]


def _repack(pieces: Iterable[str]) -> Iterator[str]:
    """Yield a text in pieces of bounded size that does not depend on the size of the given ones."""
    rest = b""
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            rest += piece[start : start + PIECE].encode("utf-8", "surrogatepass")
            while len(rest) > 8 * PIECE:
                part, rest = _cut(rest, 8 * PIECE - 8, force=True)
                yield part.decode("utf-8", "surrogatepass")
    if rest:
        yield rest.decode("utf-8", "surrogatepass")


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return values that change when a file is written to or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
