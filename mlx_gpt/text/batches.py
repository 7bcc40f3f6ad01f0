"""Training batches, prefetched by a thread, so that no step waits for its ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from queue import Full, Queue
from threading import Event, Thread

import numpy as np

from mlx_gpt.text.windows import TokenStream, check_length, endless_batches

AHEAD = 4  # batches
Batch = tuple[np.ndarray, np.ndarray]


class Batches(Iterator[Batch]):
    """``endless_batches``, prefetched by a thread. ``position`` is the number of batches taken.

    In a group of ``size`` processes, process ``rank`` takes its own ``batch_size`` rows of every batch. Raises
    ``DataError`` for a text shorter than one window.
    """

    def __init__(
        self, stream: TokenStream, T: int, batch_size: int, seed: int, position: int = 0, rank: int = 0, size: int = 1
    ):
        check_length(stream, T)  # here rather than in the thread
        self.position = position
        self._rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self._ready: Queue[Batch | Exception] = Queue(AHEAD)
        self._closed = Event()
        batches = endless_batches(stream, T, size * batch_size, seed, skip=position)
        self._thread = Thread(target=self._fill, args=(batches,), daemon=True, name="batches")

    def __next__(self) -> Batch:
        if self._thread.ident is None:  # only now: batches that are never taken need no close
            self._thread.start()
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        self.position += 1
        return batch

    def for_step(self, accumulate: int) -> Batch:
        """Return the next ``accumulate`` batches as one: x, y (accumulate * B, T)."""
        xs, ys = zip(*islice(self, accumulate), strict=True)
        return np.concatenate(xs), np.concatenate(ys)

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _fill(self, batches: Iterator[Batch]) -> None:
        # NumPy only: an MLX array belongs to the thread that created it.
        try:
            for x, y in batches:
                if not self._put((x[self._rows], y[self._rows])):
                    return
        except Exception as error:  # a disk error, a truncated file: raised by __next__
            self._put(error)

    def _put(self, item: Batch | Exception) -> bool:
        """Queue an item; return False if the batches are closed."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False
