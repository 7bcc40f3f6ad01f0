"""The text of each row so far, as the rules that depend on it need it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.generate.decoder import NO_TOKEN


class History:
    """The ids of B rows: prompts and the ``n_new`` (B,) tokens generated after each, of at most ``limits`` (B,).

    A value: every method returns a new history. All rows end at the last column; shorter ones begin with ``NO_TOKEN``.
    """

    def __init__(self, ids: mx.array, limits: Any, n_new: Any = 0):
        self.limits = np.array(limits, np.int32)
        self.n_new = np.full(self.limits.shape, n_new, np.int32)
        self._parts = [ids]

    def then(self, tokens: mx.array) -> History:
        """Return the history with T tokens appended to each row, (B, T)."""
        longer = History(self._parts[0], self.limits, self.n_new + tokens.shape[1])
        longer._parts = [*self._parts, tokens]
        return longer

    @property
    def ids(self) -> mx.array:
        """All ids, (B, L)."""
        if len(self._parts) > 1:  # concatenated only when a rule asks
            self._parts = [mx.concatenate(self._parts, axis=1)]
        return self._parts[0]

    @property
    def new(self) -> mx.array:
        """The generated ids, (B, N), ``NO_TOKEN`` before the shorter rows."""
        N = int(self.n_new.max())
        is_new = mx.arange(N) >= N - mx.array(self.n_new)[:, None]
        return mx.where(is_new, self.ids[:, self.ids.shape[1] - N :], NO_TOKEN)

    @property
    def left(self) -> mx.array:
        """How many more tokens each row may have, (B, 1)."""
        return mx.array(self.limits - self.n_new)[:, None]

    def join(self, other: History) -> History:
        """Return the rows of this history above those of another."""
        L = max(self.ids.shape[1], other.ids.shape[1])
        padded = [
            mx.pad(ids, [(0, 0), (L - ids.shape[1], 0)], constant_values=NO_TOKEN) for ids in (self.ids, other.ids)
        ]
        limits = np.concatenate([self.limits, other.limits])
        return History(mx.concatenate(padded), limits, np.concatenate([self.n_new, other.n_new]))

    def keep(self, rows: list[int]) -> History:
        """Return these rows only."""
        return History(self.ids[mx.array(rows)], self.limits[rows], self.n_new[rows])

    def drop_columns(self, n: int) -> History:
        """Return the history without its first n columns, which must be padding in every row."""
        return History(self.ids[:, n:], self.limits, self.n_new)
