"""How rows of different settings choose their next ids at once.

The rules are those of ``generate/sampling.py`` in the order of ``generate/sampler.py``. What is one number there is an
array here, (B, 1), with a number for each row. A rule that no row asks for is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mlx_gpt.generate import sampling
from mlx_gpt.generate.rng import keys_at
from mlx_gpt.serve.row import Row


class Rules:
    """What B rows choose by. ``known`` (V,) is 0 for an id that may be said, -inf for one that means nothing.

    ``said`` (B, V) counts what each row has said, where a penalty asks for it.
    """

    def __init__(self, rows: Sequence[Row], known: mx.array, said: mx.array | None = None):
        self.rows, self.known = list(rows), known
        self._keys = mx.array(np.array([row.key for row in rows], np.uint32).reshape(-1, 2))
        given = [row.settings for row in rows]
        self._bias = mx.array(biases(rows, known.size)) if any(it.logit_bias for it in given) else None
        self._temperature = column(it.temperature for it in given) if any(it.temperature for it in given) else None
        self._top_p = column(it.top_p for it in given) if any(it.top_p < 1 for it in given) else None
        self._frequency = column(it.frequency_penalty for it in given)
        self._presence = column(it.presence_penalty for it in given)
        is_penalized = any(it.frequency_penalty or it.presence_penalty for it in given)
        self._said = said if said is not None or not is_penalized else mx.zeros((len(rows), known.size))

    def choose(self, logits: mx.array) -> mx.array:
        """The next id of each row, which it has then said: (B, V) -> (B,), int32."""
        logits = self._penalize(logits if self._bias is None else logits + self._bias) + self.known
        ids = sampling.greedy(logits).astype(mx.int32)
        if self._temperature is not None:
            keys = keys_at(self._keys, [row.n_chosen for row in self.rows])
            drawn = sampling.draw(self._narrow(logits, self._temperature), keys).astype(mx.int32)
            ids = mx.where(self._temperature[:, 0] > 0, drawn, ids)
        if self._said is not None:
            self._said = self._said.at[mx.arange(ids.size), ids].add(1)
        for row in self.rows:
            row.n_chosen += 1
        return ids

    def _penalize(self, logits: mx.array) -> mx.array:
        if self._said is None:
            return logits
        return logits - self._frequency * self._said - self._presence * (self._said > 0)

    def _narrow(self, logits: mx.array, temperature: mx.array) -> mx.array:
        logits = sampling.with_temperature(logits, temperature)
        return logits if self._top_p is None else sampling.keep_top_p(logits, self._top_p)

    def join(self, more: Rules) -> Rules:
        """Those of these rows and more."""
        said = None
        if self._said is not None or more._said is not None:
            said = mx.concatenate([self._counts(), more._counts()])
        return Rules([*self.rows, *more.rows], self.known, said)

    def keep(self, kept: list[int]) -> Rules:
        """Those of some of these rows."""
        said = None if self._said is None or not kept else self._said[mx.array(kept)]
        return Rules([self.rows[i] for i in kept], self.known, said)

    def _counts(self) -> mx.array:
        return mx.zeros((len(self.rows), self.known.size)) if self._said is None else self._said


def column(numbers: Iterable[float]) -> mx.array:
    """A number for each row, (B, 1)."""
    return mx.array(list(numbers))[:, None]


def biases(rows: Sequence[Row], vocab_size: int) -> np.ndarray:
    """What each row adds to the logits, (B, V)."""
    bias = np.zeros((len(rows), vocab_size), np.float32)
    for i, row in enumerate(rows):
        for token_id, value in row.settings.logit_bias.items():
            bias[i, token_id] = value
    return bias
