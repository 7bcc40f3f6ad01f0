"""Cut documents into pieces that fit in memory, at places where cutting changes no token."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.text.decoding import EMPTY, LINE_ENDS, MARK, REPLACED, Changes
from mlx_gpt.text.token_settings import EOT

LONGEST = 1 << 21  # characters of a piece
# A text may be cut here without changing its tokens: before a single white space that a character follows. GPT-2's
# pattern joins such a space to that character, or to nothing, never to the text before it.
SEAM = re.compile(r"(?<=[^\s\0-\x1f\x7f])[ \n](?=[^\s\0-\x1f\x7f])")
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON may have half of a pair


@dataclass(frozen=True)
class TextPiece:
    """A piece of text; ``starts`` if it begins a document, ``val`` if it is for validation."""

    text: str
    starts: bool
    val: bool


class Cutter:
    """Cuts the documents of a file. ``val`` tells whether the next pieces are for validation.

    It becomes True at the last seam within the first ``train_bytes`` bytes of text, in UTF-8, unless these are None.
    """

    def __init__(self, path: Path, changes: Changes, train_bytes: int | None = None):
        self.val = train_bytes == 0
        self._path, self._changes, self._left = path, changes, train_bytes or None
        self._starts, self._after_eot = True, False

    def document(self, pieces: Iterable[str]) -> Iterator[TextPiece]:
        """Yield a document, or those between ``<|endoftext|>``, in pieces that do not depend on the given ones."""
        self._starts, self._after_eot = True, False
        rest, is_empty = "", True
        for text in self.clean(pieces):
            rest += text
            is_empty = is_empty and not text
            if self._left is not None:
                data = text.encode()
                if self._left <= len(data):
                    before = data[: self._left].decode("utf-8", "ignore")
                    train, rest = cut(rest, len(rest) - len(text) + len(before))
                    yield from self._documents(train)
                    self.val = self._starts = True
                self._left = None if self.val else self._left - len(data)
            while len(rest) > LONGEST:
                part, rest = cut(rest, LONGEST - len(EOT))
                yield from self._documents(part)
        yield from self._documents(rest)
        self._changes.add(EMPTY, self._path, is_empty)

    def clean(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield a document with line ends as ``\\n``, without a byte order mark and halves of surrogate pairs."""
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        is_start = True
        for piece in pieces:
            text = newlines.decode(piece)
            if is_start and text.startswith("\ufeff"):
                text = text.lstrip("\ufeff")
                self._changes.add(MARK, self._path)
            is_start = is_start and not text
            try:
                text.encode()
            except UnicodeEncodeError:
                text, n = SURROGATES.subn("\ufffd", text)
                self._changes.add(REPLACED, self._path, n)
            yield from (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
        yield newlines.decode("", final=True)
        self._changes.add(LINE_ENDS, self._path, newlines.newlines not in (None, "\n"))

    def _documents(self, text: str) -> Iterator[TextPiece]:
        for i, part in enumerate(text.split(EOT)):
            if i:
                self._starts = self._after_eot = True
            if self._after_eot:
                part = part.lstrip("\n")
            if self._starts and part.startswith("\ufeff"):
                part = part.lstrip("\ufeff")
                self._changes.add(MARK, self._path)
            if part:
                yield TextPiece(part, self._starts, self.val)
                self._starts = self._after_eot = False


def cut(text: str, target: int) -> tuple[str, str]:
    """Cut at the last seam of the 4,096 characters before ``target``, or there without one."""
    seams = [seam.start() for seam in SEAM.finditer(text, max(0, target - 4096), target + 2) if seam.start() <= target]
    eot = text.find(EOT, max(0, target - len(EOT) + 1), target + len(EOT) - 1)  # not inside it
    at = seams[-1] if seams else eot if 0 <= eot < target else target
    return text[:at], text[at:]
