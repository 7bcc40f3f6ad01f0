"""Text as it streams in: files, folders, globs and named corpora, in pieces that fit in memory however long it is.

A document is a whole ``.txt`` or ``.md`` file, or what stands between two ``<|endoftext|>`` in it, a line of ``.jsonl``
(field ``text``), or a row of ``.parquet`` (column ``text``).
"""

from __future__ import annotations

import glob
import hashlib
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_gpt.errors import DataError
from mlx_gpt.files import sha256_of
from mlx_gpt.text.corpus import TEXT_FILES, tiny_shakespeare
from mlx_gpt.text.records import json_records, parquet_records
from mlx_gpt.text.vocab_files import EOT

RECORD_FILES = (".jsonl", ".parquet")  # many documents in one
PIECE = 1 << 18  # bytes of a text file that are read at once
TORN = 0.1  # a file with a larger share of bytes that are no UTF-8 is no text
HUB = {  # named corpora on the Hugging Face hub: repository, file
    "tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet"),
}
Fetch = Callable[[str, str], Path]
# Where a text may be cut without changing its tokens: before one white space with a character after it. GPT-2's pattern
# takes such a space with that character, or alone, never with what stands before it. Unicode's other white space, of
# two and three bytes, is no such character.
SEAM = re.compile(
    rb"(?<=[^\0- \x7f])[ \n](?=[^\0- \x7f])"
    rb"(?!\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
)


@dataclass(frozen=True)
class Piece:
    """Some text, whether a document starts with it, and whether it is to be measured by instead of trained on."""

    text: str
    starts: bool
    val: bool


@dataclass
class Sources:
    """Files to read, and what was found out while reading them. ``pieces`` may be asked for more than once."""

    files: list[Path]
    val_fraction: float
    seed: int
    hashes: dict[str, str] = field(default_factory=dict)  # file -> sha256, of those that were read to the end
    replaced: int = 0  # bytes that are no UTF-8 and became U+FFFD

    def pieces(self) -> Iterator[Piece]:
        """All the text, file by file. Raises ``DataError`` for what is no text and what has vanished."""
        self.replaced = 0
        drawn, cut = self._plan()
        for number, path in enumerate(self.files):
            try:
                before = _stamp(path)
                if path.suffix == ".parquet":
                    yield from self._records(number, parquet_records(path), path)
                elif path.suffix == ".jsonl":
                    yield from self._records(number, json_records(path), path)
                else:
                    yield from self._text(path, 0 if number in drawn else cut.get(number))
                if _stamp(path) != before:
                    raise DataError(f"{path}: changed while it was read; prepare it again when nobody writes to it")
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error.strerror or error}); bring it back, or leave it out"
                ) from error

    def _plan(self) -> tuple[set[int], dict[int, int]]:
        """Which text files are to measure by, or else from which byte on each of them is.

        Whole files, drawn by the seed, where that comes to at least half of the share; else the end of every file.
        """
        try:
            sizes = {i: path.stat().st_size for i, path in enumerate(self.files) if path.suffix not in RECORD_FILES}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); leave it out") from error
        room = left = self.val_fraction * sum(sizes.values())
        drawn: set[int] = set()
        for i in random.Random(self.seed).sample(sorted(sizes), len(sizes)):
            if 0 < sizes[i] <= left:
                drawn.add(i)
                left -= sizes[i]
        if drawn and left <= room / 2:
            return drawn, {}
        return set(), {i: round(size * (1 - self.val_fraction)) for i, size in sizes.items()}

    def _text(self, path: Path, cut: int | None) -> Iterator[Piece]:
        """A text file in pieces; from byte ``cut`` on, at the next seam, it is to measure by."""
        sha, rest, position, already = hashlib.sha256(), b"", 0, self.replaced
        starts, val = True, cut == 0
        with path.open("rb") as file:
            while data := file.read(PIECE):
                sha.update(data)
                if not position and b"\0" in data[:8192]:
                    raise DataError(f"{path}: expected text, found a binary file (it has zero bytes); leave it out")
                position += len(data)
                rest += data
                if cut and not val and position >= cut:
                    before, rest = _at_seam(rest, len(rest) - (position - cut), anyway=True)
                    yield from self._documents(before, starts, val)
                    starts, val = True, True
                text, rest = _at_seam(rest, len(rest) - 256)  # the last bytes may be half of a character or word
                starts = yield from self._documents(text, starts, val)
        yield from self._documents(rest, starts, val)
        torn = self.replaced - already
        if torn > TORN * max(position, 1):
            raise DataError(f"{path}: expected UTF-8 text, but {torn} of {position} bytes are not; leave it out")
        self.hashes[str(path)] = sha.hexdigest()

    def _documents(self, data: bytes, starts: bool, val: bool) -> Generator[Piece, None, bool]:
        """The documents in a stretch of a file; returns whether what follows starts another one."""
        text = data.decode("utf-8", errors="replace")
        self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        if starts:
            text = text.removeprefix("\ufeff")
        for i, part in enumerate(text.replace("\r\n", "\n").split(EOT)):
            starts = starts or i > 0
            part = part.lstrip("\n") if i else part
            if part:
                yield Piece(part, starts, val)
                starts = False
        return starts

    def _records(self, number: int, records: Iterator[Iterable[str]], path: Path) -> Iterator[Piece]:
        """Each record by its own lot, so that none has to wait for the others to be counted."""
        for i, pieces in enumerate(records):
            lot = random.Random(f"{self.seed} {number} {i}").random()
            for j, part in enumerate(_parts(pieces)):
                yield Piece(part, j == 0, lot < self.val_fraction)
        self.hashes[str(path)] = sha256_of(path)


def find_sources(names: Sequence[str], val_fraction: float, seed: int, fetch: Fetch | None = None) -> Sources:
    """The files that names stand for: files, folders, globs, named corpora. ``DataError`` where there are none.

    ``fetch`` takes a repository and a file of the hub, and gives its path here.
    """
    return Sources([file for name in names for file in _files(name, fetch)], val_fraction, seed)


def _files(name: str, fetch: Fetch | None) -> list[Path]:
    if name == "shakespeare":
        return [tiny_shakespeare()]
    if name in HUB and fetch:
        return [fetch(*HUB[name])]
    path = Path(name).expanduser()
    kinds = (*TEXT_FILES, *RECORD_FILES)
    if path.is_dir():
        below = sorted(file.relative_to(path) for file in path.rglob("*"))
        shown = [file for file in below if not any(part.startswith(".") for part in file.parts)]
        found = [path / file for file in shown if file.suffix in kinds and (path / file).is_file()]
    else:
        found = [path] if path.exists() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise DataError(
            f"{name}: expected text, found no such file, folder or glob, or no {', '.join(kinds)} files in it; named "
            f"corpora are shakespeare, {', '.join(HUB)}"
        )
    return found


def _at_seam(data: bytes, about: int, anyway: bool = False) -> tuple[bytes, bytes]:
    """Cut at the last seam before position ``about``. Where there is none, nothing is taken yet, or cut ``anyway``."""
    near = max(0, about - 4096)
    found = (seam.start() for seam in SEAM.finditer(data, near, max(0, about + 4)))  # it looks so far ahead
    seams = [start for start in found if start <= about]
    at = seams[-1] if seams else 0
    if not seams and (anyway or len(data) > 8 * PIECE):
        at = about
        while about - 3 < at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
            at -= 1
    return data[:at], data[at:]


def _parts(pieces: Iterable[str]) -> Iterator[str]:
    """A text in pieces that fit side by side in memory, of a length that does not depend on that of the given ones."""
    rest = b""
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            rest += piece[start : start + PIECE].encode("utf-8", "surrogatepass")
            while len(rest) > 8 * PIECE:
                part, rest = _at_seam(rest, 8 * PIECE - 8, anyway=True)
                yield part.decode("utf-8", "surrogatepass")
    if rest:
        yield rest.decode("utf-8", "surrogatepass")


def _stamp(path: Path) -> tuple[int, int, int]:
    """What is another once a file has been written to, or another has taken its place."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
