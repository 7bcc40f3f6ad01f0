"""Decoding with a key/value cache: read the prompts in one pass, then one compiled step per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.cache import KVCache, Packed
from mlx_gpt.model.gpt import GPT, checked_ids

Inputs = dict[str, mx.array]
Choose = Callable[[mx.array, Inputs], mx.array]  # logits (B, V) and other inputs -> ids (B,)
CacheState = list[tuple[Packed, Packed]]  # keys and values of every layer

NO_TOKEN = -1  # pads shorter rows at their beginning; also chosen where the rules forbid every id


class Decoder:
    """Computes the logits that follow B rows of tokens.

    ``prefill`` reads the prompts; ``step`` and ``step_and_choose`` then read more tokens by a compiled function of
    fixed shapes. The model is put into eval mode; its weights must not change afterwards. ``bits`` stores the cache in
    half precision (16) or quantized (8, 4).
    """

    def __init__(self, model: GPT, bits: int | None = None):
        check_cache(model.config, bits)
        self.model = model.eval()
        self.bits = bits
        self.padding = mx.zeros((0,), mx.int32)  # (B,) empty slots at the beginning of each row
        self.cache: list[KVCache] = []
        self._compiled: dict[Choose | None, Callable] = {}

    @property
    def offset(self) -> int:
        """The number of slots in use, which is the length of the longest row."""
        return int(self.cache[0].offset) if self.cache else 0

    def prefill(self, rows: mx.array) -> mx.array:
        """Read rows made by ``pad_rows`` into an empty cache: (B, L) -> logits after the last token, (B, V)."""
        is_padding = rows == NO_TOKEN
        self.padding = mx.sum(is_padding, axis=1).astype(mx.int32)
        self.cache = self._new_cache(self.padding if mx.any(is_padding).item() else None)
        return self.extend(mx.maximum(rows, 0))

    def prefill_after(self, state: CacheState, n: int, rows: mx.array) -> mx.array:
        """Read the rows, (B, L), of which the cache ``state`` of one row has the first n tokens: -> logits (B, V)."""
        B = rows.shape[0]
        self.padding = mx.zeros((B,), mx.int32)
        self.cache = self._new_cache(None)
        for layer, parts in zip(self.cache, state, strict=True):
            layer.keys, layer.values = tree_map(lambda part: mx.repeat(part[:, :, :n], B, axis=0), parts)
            layer.offset = n
        return self.extend(rows[:, n:])

    def extend(self, tokens: mx.array) -> mx.array:
        """Read T more tokens per row, not compiled: (B, T) -> logits after the last, (B, V), float32.

        ``mx.compile`` would trace it again for each T, and refuses ``shapeless``: "Slice cannot infer output shapes".
        """
        last = self.model.hidden(tokens, self.cache)[:, -1:]
        return self.model.logits(last)[:, 0].astype(mx.float32)

    def step(self, tokens: mx.array) -> mx.array:
        """Read T more tokens per row in a compiled step: (B, T) -> logits after each, (B, T, V)."""
        return self._run(None, tokens, {})

    def step_and_choose(self, ids: mx.array, choose: Choose, inputs: Inputs) -> tuple[mx.array, mx.array]:
        """Read one more token per row, (B,), and choose the next by ``choose(logits, inputs)`` in one compiled step.

        Returns the next ids, (B,), and the logits they were chosen by, (B, V).
        """
        return self._run(choose, ids[:, None], inputs)

    def _run(self, choose: Choose | None, tokens: mx.array, inputs: Inputs) -> Any:
        """Grow the cache if it is full, then run the compiled step, which takes the cache and returns it."""
        start, end = self.offset, self.offset + tokens.shape[1]
        if end > self.cache[0].n_slots:
            for layer in self.cache:
                layer.grow(end)
        if choose not in self._compiled:
            self._compiled[choose] = mx.compile(partial(self._advance, choose))
        result, state = self._compiled[choose](tokens, inputs, mx.array(start), self.padding, self.state())
        for layer, (layer.keys, layer.values) in zip(self.cache, state, strict=True):
            layer.offset = end
        return result

    def _advance(
        self,
        choose: Choose | None,
        tokens: mx.array,
        inputs: Inputs,
        offset: mx.array,
        padding: mx.array,
        state: CacheState,
    ) -> tuple[Any, CacheState]:
        """Read tokens (B, T) at an offset given as an array: the function that is compiled."""
        cache, T = self._new_cache(padding), tokens.shape[1]
        for layer, (keys, values) in zip(cache, state, strict=True):
            layer.keys, layer.values, layer.offset = keys, values, offset
            layer.mask = cache[0].mask if layer is not cache[0] else layer.make_mask(T)
            layer.place = cache[0].place if layer is not cache[0] else place_of(offset, T, layer.n_slots)
        result = logits = self.model(mx.maximum(tokens, 0), cache).astype(mx.float32)
        if choose:
            result = choose(logits[:, -1], inputs), logits[:, -1]
        return result, [(layer.keys, layer.values) for layer in cache]

    def _new_cache(self, padding: mx.array | None) -> list[KVCache]:
        return [KVCache(self.model.config.n_positions, self.bits, padding) for _ in self.model.h]

    def state(self) -> CacheState:
        """Return the keys and values of every layer."""
        return [(layer.keys, layer.values) for layer in self.cache]

    def rewind(self, n: int) -> None:
        """Remove the last n tokens of every row."""
        for layer in self.cache:
            layer.offset -= n

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only; a row may be given twice."""
        chosen = mx.array(rows)
        self.padding = self.padding[chosen]
        for layer in self.cache:
            layer.keys, layer.values = tree_map(lambda part: part[chosen], (layer.keys, layer.values))
            layer.padding = None if layer.padding is None else self.padding

    def join(self, other: Decoder) -> None:
        """Append the rows of another decoder of this model below these; afterwards all rows end at the same slot."""
        if not self.cache:
            self.cache, self.padding = other.cache, other.padding
            return
        upper, lower = self.offset, other.offset
        end = max(upper, lower)
        self.padding = mx.concatenate([self.padding + (end - upper), other.padding + (end - lower)])
        for layer, more in zip(self.cache, other.cache, strict=True):
            shifted = tree_map(lambda part: _end_at(end, part[:, :, :upper]), (layer.keys, layer.values))
            below = tree_map(lambda part: _end_at(end, part[:, :, :lower]), (more.keys, more.values))
            layer.keys, layer.values = tree_map(lambda *rows: mx.concatenate(list(rows)), shifted, below)
            layer.offset, layer.padding = end, self.padding

    def drop_slots(self, n: int) -> None:
        """Remove the first n slots, which must be padding in every row."""
        self.padding = self.padding - n
        for layer in self.cache:
            layer.keys, layer.values = tree_map(lambda part: part[:, :, n:], (layer.keys, layer.values))
            layer.offset, layer.padding = layer.offset - n, self.padding


def place_of(offset: mx.array, T: int, slots: int) -> mx.array:
    """Return where T tokens are written in a compiled step: their first slot, (1,), or for each if it is one's, (S, 1).

    On a GPU the latter takes one kernel per array, ``where``, and ``slice_update`` three: it copies all slots as well,
    which the last step in flight still reads (``DynamicSliceUpdate`` in mlx/backend/gpu/primitives.cpp): its command
    buffer holds them until it completes (mlx/backend/metal/eval.cpp), so that they are not donated to the next step.
    """
    return offset.reshape(1) if T > 1 or on_cpu() else (mx.arange(slots) == offset)[:, None]


def check_cache(config: GPTConfig, bits: int | None) -> None:
    """Raise ``UsageError`` unless this model's cache can be stored in so many bits."""
    GenerationSettings(cache_bits=bits)  # raises for other numbers than 16, 8 and 4
    if bits in (8, 4) and config.head_dim % 32:
        raise UsageError(
            f"--cache-bits {bits} needs heads whose width is a multiple of 32, and this model's is {config.head_dim}"
        )


def pad_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> mx.array:
    """Return rows of any lengths as one array (B, L), ``NO_TOKEN`` before the shorter ones.

    Raises ``ValueError`` for ids outside the vocabulary.
    """
    L = max(map(len, rows))
    for row in rows:
        checked_ids(row, vocab_size)
    return mx.array(np.array([[NO_TOKEN] * (L - len(row)) + list(row) for row in rows], dtype=np.int32))


def _end_at(end: int, part: mx.array) -> mx.array:
    """Insert empty slots before those in use: (B, H, S, D) -> (B, H, end, D)."""
    return mx.pad(part, [(0, 0), (0, 0), (end - part.shape[2], 0), (0, 0)])
