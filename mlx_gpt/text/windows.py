"""Token ids side by side, and the windows that training and validation look through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenStream:
    """Documents as one row of ids, ``<|endoftext|>`` before each and after the last.

    ``ids`` (N,) integers, in memory or mapped from a file; ``starts`` (documents + 1,) the positions of the
    ``<|endoftext|>``: document i is ``ids[starts[i] + 1 : starts[i + 1]]``.
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: Tokenizer) -> TokenStream:
        """Encode documents one after the other."""
        pieces, starts, position = [], [], 0
        for document in tokenizer.encode_batch(list(documents)):
            starts.append(position)
            pieces.append(np.array([tokenizer.eot_id, *document], np.int32))
            position += len(document) + 1
        pieces.append(np.array([tokenizer.eot_id], np.int32))
        return cls(np.concatenate(pieces), np.array([*starts, position]))

    @property
    def n_tokens(self) -> int:
        """How many ids there are to predict: all but the first."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Windows:
    """Where the model looks: window i reads T ids from ``starts[i]`` on and predicts the id after each.

    A window starts where a document starts, so that nobody has to continue a story whose beginning was cut off; a
    document longer than T is cut into pieces of T. Each target is ``counted`` in just one window: the first
    ``counted[i]`` of window i. What follows them, the beginning of a document that does not fit, is
    good enough to train on, but is left out of a validation loss.
    """

    stream: TokenStream
    T: int
    starts: np.ndarray
    counted: np.ndarray

    @classmethod
    def over(cls, stream: TokenStream, T: int, skip: int = 0) -> Windows:
        """Cut a stream into windows, from position ``skip`` on (another cut for another epoch)."""
        check_length(stream, T)
        # A document that is longer than T gives full windows until its end is in reach; the one that reaches it goes
        # on to the last end in reach. So every document says by itself where the first one that begins after it is.
        ends = stream.starts[np.searchsorted(stream.starts, skip, "right") :]
        begins = np.concatenate([[skip], ends[:-1]])
        full = (ends - begins - 1) // T
        after = np.searchsorted(ends, begins + (full + 1) * T, "right").astype(np.int64)
        met = np.fromiter(_chain(after.data), np.int64)
        # Of those that are met, all windows side by side.
        n = full[met] + 1
        steps = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
        starts = np.repeat(begins[met], n) + steps * T
        return cls(stream, T, starts, np.diff(starts, append=stream.n_tokens))

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and which targets count for these windows: x, y (B, T) int32, counts (B, T) bool.

        ``y[:, :-1] == x[:, 1:]``. Past the end of the text the last id is repeated; it is not counted.
        """
        steps = np.arange(self.T + 1)
        ids = self.stream.ids[np.minimum(self.starts[rows, None] + steps, len(self.stream.ids) - 1)]
        ids = ids.astype(np.int32, copy=False)
        return ids[:, :-1], ids[:, 1:], steps[:-1] < self.counted[rows, None]


def _chain(after: memoryview) -> Iterator[int]:
    """0, what is after it, what is after that, to the end."""
    i = 0
    while i < len(after):
        yield i
        i = after[i]


def check_length(stream: TokenStream, T: int) -> None:
    """``DataError`` for a text shorter than one window."""
    if stream.n_tokens < T:
        raise DataError(
            f"the text is shorter than one window: {stream.n_tokens} tokens, and a window (n_positions) is {T}; "
            f"give more text or a smaller n_positions"
        )


def endless_batches(
    stream: TokenStream, T: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training batches without end: x, y (B, T) int32, with y[:, :-1] == x[:, 1:]. The first ``skip`` are left out."""
    rows, drawn = np.arange(T + 1), skip * batch_size
    left = np.array([], np.int64)
    for epoch in count():
        starts = _starts_of_epoch(stream, T, seed, epoch)
        drawn, passed = max(0, drawn - len(starts)), drawn
        left = np.concatenate([left, starts[passed:]])
        for i in range(0, len(left) - batch_size + 1, batch_size):
            at = left[i : i + batch_size, None] + rows
            batch = stream.ids[at].astype(np.int32, copy=False)
            yield batch[:, :-1], batch[:, 1:]
        left = left[len(left) // batch_size * batch_size :]  # the next epoch fills the last batch


def _starts_of_epoch(stream: TokenStream, T: int, seed: int, epoch: int) -> np.ndarray:
    """Where its rows of T + 1 ids start: every window once, in an order drawn from the seed and the epoch."""
    last = len(stream.ids) - (T + 1)  # where a row can start at the latest
    rng = np.random.default_rng([seed, epoch])
    windows = Windows.over(stream, T, skip=int(rng.integers(min(T, last + 1))) if epoch else 0)
    starts = rng.permutation(np.minimum(windows.starts, last))  # the text's end has no full window: step back
    # Half of the rows leave out the <|endoftext|> in front: a prompt will not have it either.
    return np.minimum(starts + rng.integers(2, size=len(starts)), last)


def entropies(stream: TokenStream, vocab_size: int) -> tuple[float, float]:
    """What a text costs, in nats per token, to one who knows only how often each token comes (the unigram entropy),
    or also how often after which other (the bigram entropy): H(token) and H(token | the one before)."""
    # Counted over what is to be predicted: all but the first. Since the first and the last are <|endoftext|>, the
    # tokens before them, all but the last, have the same counts: H(pair) - H(token) is H(token | the one before).
    unigram = _entropy(np.unique(stream.ids[1:], return_counts=True)[1])
    pairs = stream.ids[:-1].astype(np.int64) * vocab_size + stream.ids[1:]
    return unigram, _entropy(np.unique(pairs, return_counts=True)[1]) - unigram


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
