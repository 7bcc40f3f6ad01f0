"""Targets and data: ids that wrapped around, and text that was read in the wrong encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.alignment import align_pieces, aligned_as_encoded, encoded_pieces
from mlx_gpt.check.doctor.data.evidence import batches, grams, has_ids, occurs, power_below, text_of, train_ids

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

    Exact: the training ids are those of the text in uint8, uint16, int8 or int16 and not as encoded; or negative ids
    are of many kinds; or their type does not hold the vocabulary, unless they are those of the text; or rows of the
    batches are those of the corpus so wrapped. Without text: no id is above 255 in a vocabulary of more than 512, and
    of the 256 at least 250 occur (UTF-8 has 243, of which a text uses fewer).
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
    """Return in which type the ids of the text are those of training, if not as encoded."""
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
        found = align_pieces(case, wrap)
        if found.same > plain.same and found.replaced < max(plain.replaced, 1) and found.located >= plain.located:
            example = [*plain.example] if plain.example[0] else []
            why = f"the training ids are those of the text stored as {kind}: the text has ids up to {most}"
            return why, {"stored_as": kind, "encoded_and_stored": example}
    return None, {}


def as_encoded(case: Case) -> bool:
    """Return whether the training ids are those that the text is encoded as."""
    try:
        plain = case.once(aligned_as_encoded)
    except NotApplicable:
        return False
    return bool(plain.pieces) and plain.located == plain.pieces and not plain.replaced


def wrapped_batches(case: Case, ids: np.ndarray) -> str | None:
    """Return in which type the rows of the batches are those of the corpus, if not as they are."""
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


# How bytes are read by mistake, and the share of the characters above ASCII that then stand for others of UTF-8,
# which are of Latin-1 or of three bytes; of any, half: German has pairs such as ß and a quotation mark by chance.
ALL_EXPLAINED = 0.5
MISREADINGS = {"cp1252": 0.05, "mac_roman": 0.3, "cp437": 0.3, "cp1251": 0.3}
MIS_DECODED = 3e-5  # of all characters


@check("mis-decoded-text", "train_text|decode")
def mis_decoded_text(case: Case) -> Found:
    """The training text was read in the wrong encoding: "â€™" for an apostrophe, replacement characters, zero bytes.

    From three places and 3e-5 of the characters: U+FFFD; or runs of characters whose bytes in Windows-1252 (Mac, DOS,
    Cyrillic) are valid UTF-8 of Latin-1 or three bytes, if they are 5 % (30 %) of those above ASCII, or of any
    characters, if they are half. Or 1 % of control characters, or 20 % of multiples of 256, as of UTF-16.
    """
    if has_ids(case, "train_ids") and not case.has("train_text") and ids_wrapped(case):  # the text of other ids
        raise NotApplicable("train_text")
    text = case.once(text_of)[:2_000_000]
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    controls = float(((codes < 32) & ~np.isin(codes, [9, 10, 12, 13])).mean())
    swapped = float(((codes >= 256) & (codes % 256 == 0)).mean())
    replaced = int((codes == 0xFFFD).sum())
    if controls > 0.01:
        return wrongly_read(
            "UTF-16", controls, f"{controls:.0%} of the characters are control characters, as of UTF-16"
        )
    if swapped > 0.2:
        return wrongly_read(
            "UTF-16", swapped, f"{swapped:.0%} of the characters are multiples of 256: bytes are swapped"
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
    """Count the characters that are UTF-8 of others, read as ``encoding``, and those of Latin-1 or 3 bytes."""
    table = np.zeros(0x10000, np.uint8)  # character -> byte, 0 where it has none
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
            found = run.tobytes().decode("utf-8", "ignore")
            sizes = [len(character.encode()) for character in found]
            n += sum(sizes)
            typical += sum(size for size, c in zip(sizes, found, strict=True) if size > 2 or ord(c) < 256)
            if sum(sizes) == len(run) and example is None:
                example = (run.tobytes().decode(encoding, "replace")[:12], found[:12])
    return n, typical, example
