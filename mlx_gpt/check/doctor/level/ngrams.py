"""N-gram models, to compare a loss with, and to show what text with such a loss looks like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The n-grams of one order: sorted keys, counts, and the sums over each context, which is a key of n - 1 ids."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    starts: np.ndarray  # of each context in ``keys``
    totals: np.ndarray  # of each context
    discount: float

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, V: int) -> Order:
        before = keys // V
        starts = np.flatnonzero(np.diff(before, prepend=-1))
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = (once + 0.5) / (once + 2 * twice + 1)  # Ney et al. 1994; one half where no count is small
        return cls(keys, counts, before[starts], starts, np.add.reduceat(counts, starts), discount)

    def context(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the total and the number of different ids after each context, and its index; 0 where it is unseen."""
        i, known = lookup(self.contexts, wanted)
        types = np.diff(self.starts, append=len(self.keys))
        return np.where(known, self.totals[i], 0), np.where(known, types[i], 0), i


def lookup(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each wanted key in sorted keys, and whether it is there."""
    i = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return i, keys[i] == wanted


class NGrams:
    """The n-gram model of some ids, with interpolated Kneser-Ney smoothing (Chen and Goodman 1999, section 2.7).

    One discount for each order. The lower orders count the different ids to the left of an n-gram, not its
    occurrences. Ids are integers in [0, V).
    """

    def __init__(self, ids: np.ndarray, V: int, n: int):
        self.V = V
        keys, counts = np.unique(joined(ids, V, n), return_counts=True)
        self.orders = [Order.of(keys, counts, V)]
        for k in range(n - 1, 0, -1):
            keys, counts = np.unique(keys % V**k, return_counts=True)
            self.orders.insert(0, Order.of(keys, counts, V))

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """Return the loss of each id after the first n - 1, in nats: (N - n + 1,)."""
        keys = joined(ids, self.V, len(self.orders))
        p = np.full(len(keys), 1 / self.V)
        for k, order in enumerate(self.orders, 1):
            key = keys % self.V**k
            total, types, _ = order.context(key // self.V)
            i, known = lookup(order.keys, key)
            kept = np.where(known, np.maximum(order.counts[i] - order.discount, 0), 0)
            p = np.where(total > 0, (kept + order.discount * types * p) / np.maximum(total, 1), p)
        return -np.log(p)

    def sample(self, start: np.ndarray, length: int, rng: np.random.Generator) -> list[int]:
        """Return ``length`` ids drawn from the model after ``start``."""
        text = [int(i) for i in start]
        for _ in range(length):
            text.append(self._draw(text, rng))
        return text[len(start) :]

    def _draw(self, text: list[int], rng: np.random.Generator) -> int:
        for k in range(len(self.orders), 0, -1):
            order = self.orders[k - 1]
            if len(text) < k - 1:
                continue
            context = joined(np.array(text[-k + 1 :]), self.V, k - 1) if k > 1 else np.zeros(1, np.int64)
            total, types, i = (int(value[0]) for value in order.context(context))
            if total and rng.random() >= order.discount * types / total:
                part = slice(order.starts[i], order.starts[i] + types)
                kept = np.maximum(order.counts[part] - order.discount, 0).cumsum()
                return int(order.keys[part][np.searchsorted(kept, rng.random() * kept[-1], side="right")] % self.V)
        return int(rng.integers(self.V))


def joined(ids: np.ndarray, V: int, n: int) -> np.ndarray:
    """Return each n successive ids as one number: (N - n + 1,) int64."""
    ids = ids.astype(np.int64)
    keys = np.zeros(len(ids) - n + 1, np.int64)
    for i in range(n):
        keys = keys * V + ids[i : i + len(keys)]
    return keys
