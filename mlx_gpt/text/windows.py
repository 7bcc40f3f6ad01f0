"""Streams of token ids, and the windows and batches cut from them.

A batch is ``x, y``: ids and the id after each, both (B, T).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.text.tokenizer import Tokenizer

ENCODED_AT_ONCE = 10_000  # documents: Python lists of ids take ten times the memory of arrays


@dataclass(frozen=True)
class TokenStream:
    """Documents in one row of ids, with ``<|endoftext|>`` before each and after the last.

    ``ids`` (N,) are integers in memory or mapped from a file; ``starts`` (documents + 1,) are the positions of
    ``<|endoftext|>``: document i is ``ids[starts[i] + 1 : starts[i + 1]]``.
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: Tokenizer) -> TokenStream:
        """Encode documents and join them."""
        pieces, starts, position = [], [], 0
        for first in range(0, len(documents), ENCODED_AT_ONCE):
            for document in tokenizer.encode_batch(documents[first : first + ENCODED_AT_ONCE]):
                starts.append(position)
                pieces.append(np.array([tokenizer.eot_id, *tokenizer.opening, *document], np.int32))
                position += len(pieces[-1])
        pieces.append(np.array([tokenizer.eot_id], np.int32))
        return cls(np.concatenate(pieces), np.array([*starts, position]))

    @property
    def n_tokens(self) -> int:
        """The number of targets: all ids but the first."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Windows:
    """The windows of a stream: window i has the T inputs from ``starts[i]`` on, and the id after each as targets.

    A window starts at the start of a document, so that the model sees the context of what it predicts; a document
    longer than T is cut into pieces of T. Every target is counted in exactly one window: the first ``counted[i]`` of
    window i. The targets after these, of a document that does not fit, are used in training but not in a validation
    loss.
    """

    stream: TokenStream
    T: int
    starts: np.ndarray
    counted: np.ndarray

    @classmethod
    def over(cls, stream: TokenStream, T: int, skip: int = 0) -> Windows:
        """Cut a stream into windows from position ``skip`` on. Raises ``DataError`` for less than one window."""
        check_length(stream, T)
        # A document gives full windows until one contains its end; that window extends to the last end within its
        # reach. So for each document, the first document of the window after its own is known independently.
        ends = stream.starts[np.searchsorted(stream.starts, skip, "right") :]
        begins = np.concatenate([[skip], ends[:-1]])
        full = (ends - begins - 1) // T
        after = np.searchsorted(ends, begins + (full + 1) * T, "right").astype(np.int64)
        first = np.fromiter(_chain(after.data), np.int64)  # the documents at which windows start
        n = full[first] + 1  # windows from each of these to the next
        steps = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
        starts = np.repeat(begins[first], n) + steps * T
        return cls(stream, T, starts, np.diff(starts, append=stream.n_tokens))

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return inputs, targets and a mask of the counted targets: x, y (B, T) int32, mask (B, T) bool.

        ``rows`` (B,) are numbers of windows. Past the end of the stream the last id is repeated, and not counted.
        """
        steps = np.arange(self.T + 1)
        ids = self.stream.ids[np.minimum(self.starts[rows, None] + steps, len(self.stream.ids) - 1)]
        ids = ids.astype(np.int32, copy=False)
        return ids[:, :-1], ids[:, 1:], steps[:-1] < self.counted[rows, None]


def _chain(after: memoryview) -> Iterator[int]:
    """Yield 0, after[0], after[after[0]], ... to the end."""
    i = 0
    while i < len(after):
        yield i
        i = after[i]


def check_length(stream: TokenStream, T: int) -> None:
    """Raise ``DataError`` for a text shorter than one window."""
    if stream.n_tokens < T:
        raise DataError(
            f"the text is shorter than one window: {stream.n_tokens} tokens, and a window (n_positions) is {T}; "
            f"give more text or a smaller n_positions"
        )


def endless_batches(
    stream: TokenStream, T: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield training batches forever: x, y (B, T) int32, with y[:, :-1] == x[:, 1:]; the first ``skip`` are omitted.

    Each epoch has every window once, in a random order; from the second epoch on the windows are shifted at random.
    """
    offsets, to_skip = np.arange(T + 1), skip * batch_size
    pending = np.array([], np.int64)
    for epoch in count():
        starts = _starts_of_epoch(stream, T, seed, epoch)
        pending = np.concatenate([pending, starts[to_skip:]])
        to_skip = max(0, to_skip - len(starts))
        for i in range(0, len(pending) - batch_size + 1, batch_size):
            positions = pending[i : i + batch_size, None] + offsets
            ids = stream.ids[positions].astype(np.int32, copy=False)
            yield ids[:, :-1], ids[:, 1:]
        pending = pending[len(pending) // batch_size * batch_size :]  # the next epoch fills the last batch


def _starts_of_epoch(stream: TokenStream, T: int, seed: int, epoch: int) -> np.ndarray:
    """Return the start of each row of T + 1 ids in an epoch: every window once, in random order."""
    last = len(stream.ids) - (T + 1)  # possible start of a row
    rng = np.random.default_rng([seed, epoch])
    windows = Windows.over(stream, T, skip=int(rng.integers(min(T, last + 1))) if epoch else 0)
    starts = rng.permutation(np.minimum(windows.starts, last))  # a window past the end of the text is moved back
    # Half of the rows omit the leading <|endoftext|>, as a prompt does.
    return np.minimum(starts + rng.integers(2, size=len(starts)), last)
