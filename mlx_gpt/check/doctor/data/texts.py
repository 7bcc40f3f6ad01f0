"""Targets and data: ids that wrapped around in a small integer type, and text read in the wrong encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.alignment import align_pieces, aligned_as_encoded, encoded_pieces
from mlx_gpt.check.doctor.data.evidence import batches, grams, occurs, power_below, text_of, train_ids

WRAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    kind: (lambda ids, kind=kind: ids.astype(kind).astype(np.int64))  # type: ignore[misc]
    for kind in ("uint8", "uint16", "int8", "int16")
}


@check(
    "ids-wrapped",
    "train_ids",
    explains=("ids-outside-vocabulary", "tokenizers-differ", "end-of-text-never-learned", "vocabulary-mismatch"),
)
def ids_wrapped(case: Case) -> Found:
    """Ids were stored in an integer type that is too small: large ids wrapped around and stand for other tokens.

    Exact: the training ids are the ids of the text stored in uint8, uint16, int8 or int16, and not as they are encoded;
    or there are three or more different negative ids; or the type of the ids does not hold the vocabulary and they are
    not those of the text; or rows of the batches are training ids stored in such a type. Without the text: a vocabulary
    of more than 512 of which only ids up to 255 occur, at least 250 of them (UTF-8 has 243 bytes, of which a text uses
    fewer).
    """
    ids = case.once(train_ids)
    negative = np.unique(ids[ids < 0])
    why: str | None = None
    evidence: dict[str, Any] = {}
    if len(negative) > 2:
        why = f"{len(negative)} different ids are negative, from {negative[0]}: they were stored in a signed type"
    elif case.has("encode") or case.has("encode_training"):
        why, evidence = wrapped_text(case)
    if why is None and np.iinfo(ids.dtype).max < case.vocab_size - 1 and not as_encoded(case):
        why = f"the training ids are stored as {ids.dtype}, which ends at {np.iinfo(ids.dtype).max}"
    if why is None and case.has("batches"):
        why = wrapped_batches(case, ids)
    if why is None and case.vocab_size > 512 and ids.max() < 256 and len(np.unique(ids)) >= 250:
        why = f"of a vocabulary of {case.vocab_size} ids only 0 to 255 occur, and {len(np.unique(ids))} of these"
    if why is None:
        return None
    return {
        "measured": [int(ids.min()), int(ids.max())],
        "expected": [0, case.vocab_size - 1],
        "why": why,
        "remedy": f"encode the text again and store ids in a type that holds {case.vocab_size - 1}: uint16 up to "
        "65,535, else int32",
        "evidence": {"dtype": str(ids.dtype), **evidence},
    }


def wrapped_text(case: Case) -> tuple[str | None, dict[str, Any]]:
    """Return why the training ids must be the ids of the text stored in a small type, and evidence; else None."""
    if as_encoded(case):
        return None, {}
    try:
        plain = case.once(aligned_as_encoded)
    except NotApplicable:
        return None, {}
    most = max(int(ids.max(initial=0)) for _, ids in case.once(encoded_pieces))
    for kind, wrap in WRAPS.items():
        if most <= np.iinfo(kind).max:
            continue
        wrapped = align_pieces(case, wrap)
        if wrapped.same > plain.same and wrapped.replaced < max(plain.replaced, 1) and wrapped.located >= plain.located:
            example = [*plain.example] if plain.example[0] else []
            why = f"the training ids are those of the text stored as {kind}: the text has ids up to {most}"
            return why, {"stored_as": kind, "encoded_and_stored": example}
    return None, {}


def as_encoded(case: Case) -> bool:
    """Return True if the training ids are those of the encoded text."""
    try:
        plain = case.once(aligned_as_encoded)
    except NotApplicable:
        return False
    return bool(plain.pieces) and plain.located == plain.pieces and not plain.replaced


def wrapped_batches(case: Case, ids: np.ndarray) -> str | None:
    """Return why rows of the batches must be training ids stored in a small type; else None."""
    rows = [row for x, _ in case.once(batches) for row in x]
    n = power_below(min(len(row) for row in rows))
    starts = np.concatenate([grams(row[:n], n) for row in rows])
    changed = ~occurs(starts, ids, n)
    for kind, wrap in WRAPS.items():
        if n >= 8 and changed.sum() >= 3 and ids.max() > np.iinfo(kind).max:
            share = float(occurs(starts, wrap(ids), n)[changed].mean())
            if share > 0.9:
                return f"{int(changed.sum())} rows of the batches are those of the training ids stored as {kind}"
    return None


# Encodings in which UTF-8 is read by mistake. A text is taken to be read in one if, of its characters above ASCII, at
# least this share gives valid UTF-8 when written in it, of characters of Latin-1 or of three bytes; or half of them
# gives any valid UTF-8. A few do so by chance, such as ß before a quotation mark in German.
ALL_EXPLAINED = 0.5
MISREADINGS = {"cp1252": 0.05, "mac_roman": 0.3, "cp437": 0.3, "cp1251": 0.3}
MIS_DECODED = 3e-5  # of all characters


@check("mis-decoded-text", "train_text|decode")
def mis_decoded_text(case: Case) -> Found:
    """The training text was read in the wrong encoding: "â€™" for an apostrophe, replacement characters, zero bytes.

    A fault if three characters and 3e-5 of all are U+FFFD; or if six characters and 3e-5 of all, written in
    Windows-1252 (Mac Roman, DOS, Cyrillic), are valid UTF-8: of characters of Latin-1 or of three bytes for 5 % (30 %)
    of those above ASCII, or of any characters for half of them. Also if 1 % are control characters, or 20 % have codes
    that are multiples of 256, as when UTF-16 is read otherwise.
    """
    if case.has("train_ids") and not case.has("train_text") and ids_wrapped(case):  # the text of other ids
        raise NotApplicable("train_text")
    text = case.once(text_of)[:2_000_000]
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    controls = float(((codes < 32) & ~np.isin(codes, [9, 10, 12, 13])).mean())
    swapped = float(((codes >= 256) & (codes % 256 == 0)).mean())
    replaced = int((codes == 0xFFFD).sum())
    if controls > 0.01:
        return wrongly_read(
            "UTF-16", controls, f"{controls:.0%} of the characters are control characters, as when UTF-16 is read"
        )
    if swapped > 0.2:
        return wrongly_read(
            "UTF-16",
            swapped,
            f"{swapped:.0%} of the characters have codes that are multiples of 256: bytes are swapped",
        )
    for encoding, least in MISREADINGS.items():
        n, typical, example = explained_by_utf8(codes, encoding)
        above = max(int((codes > 127).sum()), 1)
        share = n / above
        enough = share > ALL_EXPLAINED or typical / above > least
        if example and n >= 6 and enough and n > MIS_DECODED * len(codes):
            why = f"{n} characters such as {example[0]!r} are UTF-8 read as {encoding}, for {example[1]!r}"
            return wrongly_read(encoding, share, why)
    if replaced >= 3 and replaced > MIS_DECODED * len(codes):
        why = f"{replaced} characters are U+FFFD, which stands for bytes that could not be read"
        return wrongly_read("an encoding with errors='replace'", replaced / len(codes), why)
    return None


def wrongly_read(encoding: str, share: float, why: str) -> Found:
    return {
        "measured": share,
        "expected": 0,
        "why": why,
        "remedy": "read the file in its own encoding, mostly open(path, encoding='utf-8'), and encode it again",
        "evidence": {"read_as": encoding},
    }


def explained_by_utf8(codes: np.ndarray, encoding: str) -> tuple[int, int, tuple[str, str] | None]:
    """Count the characters whose bytes in ``encoding`` are valid UTF-8, and those that are UTF-8 of usual characters.

    Usual are Latin-1 and those of three bytes. Also returns an example, as read and as meant.
    """
    table = np.zeros(0x10000, np.uint8)  # character -> byte in the encoding, 0 where it has none
    for byte in range(128, 256):
        table[byte] = byte if encoding == "cp1252" and byte < 160 else table[byte]  # bytes that it leaves undefined
        character = bytes([byte]).decode(encoding, "ignore")
        if character:
            table[ord(character)] = byte
    data = np.where(codes < 0x10000, table[np.minimum(codes, 0xFFFF)], 0)
    runs = np.split(data, np.flatnonzero(np.diff(data > 0)) + 1) if data.any() else []
    return sum_of_utf8(runs, encoding)


def sum_of_utf8(runs: list[np.ndarray], encoding: str) -> tuple[int, int, tuple[str, str] | None]:
    n = typical = 0
    example = None
    for run in runs:
        if run[0]:
            read = run.tobytes().decode("utf-8", "ignore")
            sizes = [len(character.encode()) for character in read]
            n += sum(sizes)
            typical += sum(size for size, c in zip(sizes, read, strict=True) if size > 2 or ord(c) < 256)
            if sum(sizes) == len(run) and example is None:
                example = (run.tobytes().decode(encoding, "replace")[:12], read[:12])
    return n, typical, example
