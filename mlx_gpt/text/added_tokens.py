"""Find added tokens in a text before it is split into words, as in tokenizers (``added_vocabulary.rs``)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SPACE, NO_SPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # Unicode's white space; Python's \s has four characters more
SPACES = re.compile(f"{SPACE}*")
FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before its words.

    ``single_word`` is found only between characters that are not of words; ``lstrip`` and ``rstrip`` take the white
    space before and after; ``normalized`` ones are looked for after all others; ``special`` ones only on request.
    """

    text: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        return {flag: getattr(self, flag) for flag in FLAGS}


def split_at_tokens(text: str, tokens: Sequence[AddedToken], allow_special: bool) -> Iterator[str | int]:
    """Yield the ids of the tokens in a text, special ones only with ``allow_special``, and the texts between them."""
    if not any(token.text in text for token in tokens if allow_special or not token.special):
        tokens = ()
    parts: list[str | int] = [text] if text else []
    for normalized in (False, True):
        wanted = [token for token in tokens if token.normalized == normalized]
        if wanted:
            found = [[part] if isinstance(part, int) else _split(part, wanted, allow_special) for part in parts]
            parts = [part for split in found for part in split]
    yield from parts


def _split(text: str, tokens: Sequence[AddedToken], allow_special: bool) -> Iterator[str | int]:
    """Split a text at tokens: at the first in the text, and of several there at the longest."""
    known = {token.text: token for token in tokens}
    start = 0
    for found in re.finditer("|".join(map(re.escape, sorted(known, key=len, reverse=True))), text):
        token, (begin, end) = known[found[0]], found.span()
        if token.special and not allow_special:
            continue
        if token.single_word and (_is_of_word(text[begin - 1 : begin]) or _is_of_word(text[end : end + 1])):
            continue
        if token.lstrip:
            begin -= _n_spaces(text[start:begin][::-1], 0)
        if token.rstrip:
            end += _n_spaces(text, end)
        if start < begin:
            yield text[start:begin]
        yield token.id
        start = end
    if start < len(text):
        yield text[start:]


def _n_spaces(text: str, start: int) -> int:
    """Return the number of white space characters from ``start`` on."""
    found = SPACES.match(text, start)
    return found.end() - start if found else 0


def _is_of_word(character: str) -> bool:
    """Return True for a character of Unicode's \\w; Python's lacks marks."""
    kind = unicodedata.category(character) if character else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or character in ("\u200c", "\u200d")
