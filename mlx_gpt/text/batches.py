"""Training batches, drawn ahead of time, so that no step waits for its ids."""

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
    """``endless_batches``, drawn by a thread. ``position`` is how many were taken: where another one would go on.

    Of ``size`` processes that train together, each takes its own ``batch_size`` rows of every batch: ``rank`` says
    which. Raises ``DataError`` for a text shorter than one window.
    """

    def __init__(
        self, stream: TokenStream, T: int, batch_size: int, seed: int, position: int = 0, rank: int = 0, size: int = 1
    ):
        check_length(stream, T)  # here rather than in the thread
        self.position = position
        self._mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self._drawn: Queue[Batch | Exception] = Queue(AHEAD)
        self._closed = Event()
        batches = endless_batches(stream, T, size * batch_size, seed, skip=position)
        self._thread = Thread(target=self._draw, args=(batches,), daemon=True, name="batches")

    def __next__(self) -> Batch:
        if self._thread.ident is None:  # not before: who takes no batch need not close
            self._thread.start()
        batch = self._drawn.get()
        if isinstance(batch, Exception):
            raise batch
        self.position += 1
        return batch

    def for_step(self, accumulate: int) -> Batch:
        """The next batch, or for ``accumulate`` > 1 so many of them: x, y (accumulate, B, T)."""
        if accumulate == 1:
            return next(self)
        xs, ys = zip(*islice(self, accumulate), strict=True)
        return np.stack(xs), np.stack(ys)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _draw(self, batches: Iterator[Batch]) -> None:
        # NumPy only: MLX's arrays belong to the thread that makes them.
        try:
            for x, y in batches:
                if not self._put((x[self._mine], y[self._mine])):
                    return
        except Exception as error:  # a disk that fails, a file cut short meanwhile: for whoever asks next
            self._put(error)

    def _put(self, item: Batch | Exception) -> bool:
        """Whether it was taken over before the batches were closed."""
        while not self._closed.is_set():
            try:
                self._drawn.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False
