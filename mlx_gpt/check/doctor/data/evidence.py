"""Evidence of the training data: the corpus as ids, its n-grams, batches, pieces of text, encoding and decoding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable

MOST_IDS = 10_000_000  # of a corpus, to examine; hashing them takes 5 s on two cores
BATCHES = 32  # of training, to examine
SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?(?:s|eos|bos|pad|unk)>")
Batch = tuple[np.ndarray, np.ndarray]


def train_ids(case: Case) -> np.ndarray:
    """Return the training ids as integers (N,), the first ``MOST_IDS`` of them."""
    return flat_ids(case, "train_ids")


def val_ids(case: Case) -> np.ndarray:
    """Return the validation ids as integers (N,)."""
    return flat_ids(case, "val_ids")


def flat_ids(case: Case, name: str) -> np.ndarray:
    """Return the ids of a text, the first ``MOST_IDS`` of them. Raises ``NotApplicable`` if they were not given."""
    if not case.has(name):
        raise NotApplicable(name)
    ids: np.ndarray = case.given[name][:MOST_IDS]
    return ids


def batches(case: Case) -> list[Batch]:
    """Return the first batches of training: x, y (B, T) each."""
    if not case.has("batches"):
        raise NotApplicable("batches")
    iterator = case.call_function("batches", lambda: iter(case.given["batches"]()))
    taken: list[Batch] = []
    for _ in range(BATCHES):
        pair = case.call_function("batches", lambda: next(iterator, None))
        if pair is None:
            break
        taken.append(checked_batch(pair))
    if not taken:
        raise CallFailed("batches", "wrong-shape", "batches gave no batch; expected an iterator of (x, y)")
    return taken


def checked_batch(pair: Any) -> Batch:
    """Return a batch as integers (B, T) each, or raise ``CallFailed``."""
    try:
        x, y = (as_numpy(part) for part in pair)
    except (TypeError, ValueError):
        raise CallFailed("batches", "wrong-shape", "batches gave something else than pairs (x, y) of ids") from None
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or y.size != x.size or x.dtype.kind not in "iu" or y.dtype.kind not in "iu":
        message = f"batches gave x {x.shape} {x.dtype} and y {y.shape} {y.dtype}; expected ids of shape (B, T) each"
        raise CallFailed("batches", "wrong-shape", message)
    return x.astype(np.int64), y.reshape(x.shape).astype(np.int64)


def counted(x: np.ndarray, y: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return which targets the loss counts: (B, T) bool. Ids outside the vocabulary are ignored, and one that masks.

    An id of the vocabulary is taken to mask targets if it is nine tenths of those that differ from the next input.
    """
    counts = (y >= 0) & (y < vocab_size)
    later = y[:, :-1] != x[:, 1:]
    wrong = y[:, :-1][later & counts[:, :-1]]
    if wrong.size:
        values, numbers = np.unique(wrong, return_counts=True)
        if numbers.max() > 0.9 * wrong.size and len(np.unique(x)) > 2 and wrong.size < 0.95 * y.size:
            counts &= y != values[numbers.argmax()]
    return counts


def mixed(values: np.ndarray) -> np.ndarray:
    """Return a hash of each value, 64 bits (SplitMix64, Steele et al. 2014)."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def grams(ids: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of the n ids from each position on, for n a power of two: (N − n + 1,) uint64."""
    hashes, length = mixed(ids.astype(np.int64)), 1
    while length < n:
        hashes = mixed(hashes[:-length] * np.uint64(3) + hashes[length:]) if len(hashes) > length else hashes[:0]
        length *= 2
    return hashes


def occurs(wanted: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """Return which hashes of n-grams occur in ids, bool of the shape of ``wanted``; reads in parts, to bound memory."""
    present = np.zeros(len(wanted), bool)
    for start in range(0, len(ids), 1 << 20):
        hashes = np.sort(grams(ids[start : start + (1 << 20) + n - 1], n))  # np.isin takes ten times as long
        if len(hashes):
            present |= hashes[np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)] == wanted
    return present


def power_below(value: float) -> int:
    """Return the largest power of two that is at most ``value``; at least 1."""
    return 1 << max(int(value).bit_length() - 1, 0)


def encoded(case: Case, text: str, name: str = "encode") -> list[int]:
    """Return the ids of a text by ``encode`` or ``encode_training``."""
    ids = case.call_function(name, lambda: as_numpy(case.given[name](text)))
    if not isinstance(ids, np.ndarray) or (ids.size and ids.dtype.kind not in "iu"):
        raise CallFailed(name, "wrong-shape", f"{name} returned something else than a list of ids")
    return [int(value) for value in ids.reshape(-1)]


def decoded(case: Case, ids: Any) -> str:
    """Return the text of ids by ``decode``."""
    text = case.call("decode", [int(value) for value in ids])
    if not isinstance(text, str):
        raise CallFailed("decode", "wrong-shape", f"decode returned {type(text).__name__}; expected a str")
    return text


def text_of(case: Case) -> str:
    """Return the training text, else the beginning of the training ids, decoded."""
    text = case.given.get("train_text")
    if isinstance(text, str) and text.strip():
        return text
    if not case.has("decode", "train_ids"):
        raise NotApplicable("train_text")
    ids = case.once(train_ids)[:20_000]
    return decoded(case, ids[(ids >= 0) & (ids < case.vocab_size)]).strip("\ufffd")


def pieces(case: Case) -> list[str]:
    """Return pieces from all parts of the training text, the first of them longer, cut at spaces.

    They hold no special tokens, such as ``<|endoftext|>``, which some encoders refuse in a text.
    """
    text = case.once(text_of)
    starts = np.linspace(0, max(len(text) - 1000, 0), 24).astype(int)
    chosen = [
        piece for start in sorted(set(starts.tolist())) if (piece := piece_at(text, start, 1000 if start else 50_000))
    ]
    if not chosen:
        raise NotApplicable("train_text of some length")
    return chosen


def piece_at(text: str, start: int, length: int) -> str:
    """Return the longest part of a stretch of text without special tokens, cut at spaces where it has any."""
    piece = max(SPECIAL.split(text[start : start + length]), key=len)
    if not text.startswith(piece):
        piece = piece[max(piece.find(" "), 0) :]
    return piece if text.endswith(piece) or " " not in piece[1:] else piece[: piece.rindex(" ")]


def rare_pieces(case: Case) -> Iterator[str]:
    """Yield a short piece around the first occurrence of each character of the training text, for 300 at most."""
    text = case.once(text_of)[:2_000_000]
    for character in islice(sorted(set(text), key=text.find), 300):
        place = text.find(character)
        start, end = text.rfind(" ", max(place - 60, 0), max(place - 8, 0)), text.find(" ", place + 8, place + 60)
        whole_words = start >= 0 and end >= 0
        piece = text[start:end] if whole_words else text[max(place - 12, 0) : place + 12]
        if not SPECIAL.search(text[max(place - 60, 0) : place + 60]):
            yield piece
