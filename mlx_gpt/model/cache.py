"""The key/value cache of one layer: what earlier tokens answered and gave, kept so that it is computed once."""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of the tokens so far, in room for ``n_positions`` of them allocated at first use.

    ``offset`` counts the tokens held; the next token sits at that position.
    """

    def __init__(self, n_positions: int):
        self.n_positions = n_positions
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def extend(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of T new tokens, (B, H, T, D) each; return all S = offset + T: (B, H, S, D)."""
        B, H, T, D = k.shape
        if self._keys is None or self._values is None:
            self._keys = mx.zeros((B, H, self.n_positions, D), k.dtype)
            self._values = mx.zeros((B, H, self.n_positions, D), v.dtype)
        start, self.offset = self.offset, self.offset + T
        self._keys[:, :, start : self.offset] = k
        self._values[:, :, start : self.offset] = v
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]
