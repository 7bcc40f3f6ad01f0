"""Align pieces of the training text, encoded, with the training ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.data.evidence import encoded, grams, pieces, train_ids

RESYNC = 8  # equal ids after which two texts that differed are in step again
LARGEST_GAP = 40  # ids in which they may differ at one place
LOCATED = 0.8  # share of a piece's ids that must agree for it to be found in the training ids
MOST_IDS = 5_000_000  # training ids to search
SAME_FREQUENCIES = 0.9  # share that two texts have in common by frequency; 24,000 characters of one text: 0.97
SECONDS = 4.0  # that a slow tokenizer may take


@dataclass
class Aligned:
    """How many encoded pieces of the text were found in the training ids, and how many of their ids agree."""

    pieces: int = 0
    located: int = 0
    same: int = 0  # ids of the located pieces that agree
    replaced: int = 0  # and that differ
    spots: int = 0  # places where they differ
    example: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]  # encoded, in training

    @property
    def share_replaced(self) -> float:
        return self.replaced / max(self.same + self.replaced, 1)


def encoded_pieces(case: Case) -> list[tuple[str, np.ndarray]]:
    """Return the pieces of the text with their ids, by ``encode_training`` where it is given, else ``encode``."""
    name = "encode_training" if case.has("encode_training") else "encode"
    end = case.seconds_left() - SECONDS
    chosen = []
    for piece in sorted(case.once(pieces), key=len):
        chosen.append((piece, np.array(encoded(case, piece, name), np.int64)))
        if case.seconds_left() < end:
            break
    return chosen


def aligned_as_encoded(case: Case) -> Aligned:
    """Align the encoded text with the training ids."""
    return align_pieces(case, lambda ids: ids)


def align_pieces(case: Case, wrap: Callable[[np.ndarray], np.ndarray]) -> Aligned:
    """Find each encoded piece in the training ids by 64 or 16 equal ids, and compare the ids that follow.

    ``wrap`` changes the encoded ids first, as storing them in a small integer type does.
    """
    if not case.has("train_ids"):
        raise NotApplicable("train_ids")
    train = case.once(train_ids)[:MOST_IDS].astype(np.int64)
    hashes = {64: case.once(hashed_64), 16: case.once(hashed_16)}
    result = Aligned()
    for _, raw in case.once(encoded_pieces):
        ids = wrap(raw)[2:-2]  # the ends of a piece may be encoded otherwise than inside a text
        if len(ids) < 24:
            continue
        result.pieces += 1
        best = Aligned()
        for n in (64, 16):
            for offset in {0, len(ids) // 4, len(ids) // 2}:
                if len(ids) - offset < n + RESYNC:
                    continue
                (anchor,) = grams(ids[offset : offset + n], n)
                for place in np.flatnonzero(hashes[n] == anchor)[:16]:
                    found = align(ids[offset:], train[place : place + 2 * len(ids)], case.given.get("end_of_text"))
                    best = max(best, found, key=lambda one: one.same)
                if best.same:
                    break
            if best.same:
                break
        if best.same >= LOCATED * len(ids) / 2 and best.located:
            result.located += 1
            result.same += best.same
            result.replaced += best.replaced
            result.spots += best.spots
            result.example = result.example if result.example[0] else best.example
    return result


def hashed_64(case: Case) -> np.ndarray:
    """Return a hash of each 64 successive training ids."""
    return grams(case.once(train_ids)[:MOST_IDS], 64)


def hashed_16(case: Case) -> np.ndarray:
    """Return a hash of each 16 successive training ids."""
    return grams(case.once(train_ids)[:MOST_IDS], 16)


def align(ids: np.ndarray, train: np.ndarray, end_of_text: int | None) -> Aligned:
    """Compare encoded ids with training ids that begin alike, as ``diff`` does.

    Ids that only one side has, such as separators of documents, are passed over. ``located`` is 1 if ``LOCATED`` of the
    ids agree.
    """
    result, i, j = Aligned(), 0, 0
    passed = 0
    while i < len(ids) and j < len(train):
        size = min(len(ids) - i, len(train) - j)
        differ = ids[i : i + size] != train[j : j + size]
        same = int(differ.argmax()) if differ.any() else size
        result.same, i, j = result.same + same, i + same, j + same
        if same == size:
            break
        gap = resync(ids[i : i + LARGEST_GAP], train[j : j + LARGEST_GAP])
        if gap is None:
            break
        mine, other = ids[i : i + gap[0]], train[j : j + gap[1]]
        i, j, passed = i + gap[0], j + gap[1], passed + gap[0]
        if len(mine) and len(other) and end_of_text not in other:
            result.replaced, result.spots = result.replaced + len(mine), result.spots + 1
            result.example = result.example if result.example[0] else (mine[:8].tolist(), other[:8].tolist())
    result.located = int(result.same + passed >= 0.9 * len(ids) and result.same >= LOCATED * len(ids))
    return result


def resync(first: np.ndarray, second: np.ndarray) -> tuple[int, int] | None:
    """Return the fewest ids of each to skip so that the next ``RESYNC`` agree, or None if none do."""
    if min(len(first), len(second)) < RESYNC:
        return None
    windows = [np.lib.stride_tricks.sliding_window_view(ids, RESYNC) for ids in (first, second)]
    places = np.argwhere((windows[0][:, None] == windows[1][None]).all(axis=-1))
    if not len(places):
        return None
    mine, other = places[places.sum(axis=1).argmin()]
    return int(mine), int(other)


def same_frequencies(case: Case) -> bool:
    """Return True if the ids of the encoded pieces have the frequencies of the training ids, nine tenths of them."""
    counts = [
        np.bincount(ids[(ids >= 0) & (ids < case.vocab_size)], minlength=case.vocab_size)
        for ids in (np.concatenate([ids for _, ids in encoded_pieces(case)]), case.once(train_ids))
    ]
    first, second = (count / max(count.sum(), 1) for count in counts)
    return bool(np.minimum(first, second).sum() > SAME_FREQUENCIES)
