"""A model at work: rows of tokens in, the logits of what may come next out, with a cache of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.settings import check_cache_bits
from mlx_gpt.model.cache import KVCache, Packed
from mlx_gpt.model.gpt import GPT, checked_ids

Inputs = dict[str, mx.array]
Choose = Callable[[mx.array, Inputs], mx.array]  # logits (B, V) and what else it depends on -> ids (B,)
Kept = list[tuple[Packed, Packed]]  # keys and values of every layer

NO_TOKEN = -1  # stands before the shorter rows of a batch


class Decoder:
    """Reads prompts in one pass, then goes on by compiled steps of fixed shapes. For B rows side by side.

    Puts the model into eval mode and takes its weights as they are now: after further training make a new one.
    ``bits`` keeps the cache in half precision (16) or quantized (8, 4).
    """

    def __init__(self, model: GPT, bits: int | None = None):
        check_cache(model.config, bits)
        self.model = model.eval()
        self.bits = bits
        self.padding = mx.zeros((0,), mx.int32)  # slots at the beginning of each row that hold no token: (B,)
        self.cache: list[KVCache] = []
        self._compiled: dict[Choose | None, Callable] = {}

    @property
    def offset(self) -> int:
        """How many slots are in use: the length of the longest row."""
        return int(self.cache[0].offset) if self.cache else 0

    def prefill(self, rows: mx.array) -> mx.array:
        """Read the rows ``side_by_side`` in one pass, forgetting what was before: (B, L) -> logits (B, V)."""
        is_padding = rows == NO_TOKEN
        self.padding = mx.sum(is_padding, axis=1).astype(mx.int32)
        padding = self.padding if mx.any(is_padding).item() else None
        self.cache = [KVCache(self.model.config.n_positions, self.bits, padding) for _ in self.model.h]
        return self.read(mx.maximum(rows, 0))

    def resume(self, kept: Kept, n: int, rows: mx.array) -> mx.array:
        """The same where keys and values of the first n tokens are ``kept``, of one row, and all begin with them."""
        B = rows.shape[0]
        self.padding = mx.zeros((B,), mx.int32)
        self.cache = [KVCache(self.model.config.n_positions, self.bits) for _ in self.model.h]
        for layer, parts in zip(self.cache, kept, strict=True):
            layer.keys, layer.values = (tuple(mx.repeat(x[:, :, :n], B, axis=0) for x in part) for part in parts)
            layer.offset = n
        return self.read(rows[:, n:])

    def read(self, tokens: mx.array) -> mx.array:
        """Go on with T tokens in every row, in one pass: (B, T) -> the logits after the last, (B, V)."""
        last = self.model.hidden(tokens, self.cache)[:, -1:]
        return self.model.logits(last)[:, 0]

    def step(self, tokens: mx.array) -> mx.array:
        """The same by a compiled step, with the logits after each token: (B, T) -> (B, T, V)."""
        return self._run(None, tokens, {})

    def turn(self, ids: mx.array, choose: Choose, inputs: Inputs) -> tuple[mx.array, mx.array]:
        """One token more in every row and the choice of the next, ``choose(logits, inputs)``, in one compiled step.

        (B,) -> the next ids, (B,), and the logits that they were chosen by, (B, V).
        """
        return self._run(choose, ids[:, None], inputs)

    def _run(self, choose: Choose | None, tokens: mx.array, inputs: Inputs) -> Any:
        start, end = self.offset, self.offset + tokens.shape[1]
        if end > self.cache[0].n_slots:
            for layer in self.cache:
                layer.grow(end)
        if choose not in self._compiled:
            self._compiled[choose] = mx.compile(partial(self._advance, choose))
        kept = [(layer.keys, layer.values) for layer in self.cache]
        result, kept = self._compiled[choose](tokens, inputs, mx.array(start), self.padding, kept)
        for layer, (layer.keys, layer.values) in zip(self.cache, kept, strict=True):
            layer.offset = end
        return result

    def _advance(
        self, choose: Choose | None, tokens: mx.array, inputs: Inputs, offset: mx.array, padding: mx.array, kept: Kept
    ) -> tuple[Any, Kept]:
        """What is compiled: a function of arrays, of which the cache is one of the results."""
        cache: list[KVCache] = []
        for keys, values in kept:
            layer = KVCache(self.model.config.n_positions, self.bits, padding)
            layer.offset, layer.keys, layer.values = offset, keys, values
            layer.mask = cache[0].mask if cache else layer.make_mask(tokens.shape[1])
            cache.append(layer)
        result = logits = self.model(mx.maximum(tokens, 0), cache)
        if choose:
            result = choose(logits[:, -1], inputs), logits[:, -1]
        return result, [(layer.keys, layer.values) for layer in cache]

    def rewind(self, n: int) -> None:
        """Forget the last n tokens of every row."""
        for layer in self.cache:
            layer.offset -= n

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, which may occur twice."""
        chosen = mx.array(rows)
        self.padding = self.padding[chosen]
        for layer in self.cache:
            layer.keys = tuple(part[chosen] for part in layer.keys)
            layer.values = tuple(part[chosen] for part in layer.values)
            layer.padding = None if layer.padding is None else self.padding

    def join(self, other: Decoder) -> None:
        """Take in the rows of another decoder of this model, below these; from here on all stand at the same slot."""
        if not self.cache:
            self.cache, self.padding = other.cache, other.padding
            return
        mine, theirs = self.offset, other.offset
        end = max(mine, theirs)
        self.padding = mx.concatenate([self.padding + (end - mine), other.padding + (end - theirs)])
        for layer, more in zip(self.cache, other.cache, strict=True):
            layer.keys = _below(layer.keys, mine, more.keys, theirs)
            layer.values = _below(layer.values, mine, more.values, theirs)
            layer.offset, layer.padding = end, self.padding

    def forget(self, n: int) -> None:
        """Do without the first n slots, in which no row holds a token."""
        self.padding = self.padding - n
        for layer in self.cache:
            layer.keys = tuple(part[:, :, n:] for part in layer.keys)
            layer.values = tuple(part[:, :, n:] for part in layer.values)
            layer.offset, layer.padding = layer.offset - n, self.padding


def check_cache(config: GPTConfig, bits: int | None) -> None:
    """Raise ``UsageError`` unless this model's cache can be kept in so many bits."""
    check_cache_bits(bits)
    if bits in (8, 4) and config.head_dim % 32:
        raise UsageError(
            f"cache-bits {bits} needs heads whose width is a multiple of 32, and this model's is {config.head_dim}"
        )


def side_by_side(rows: Sequence[Sequence[int]], vocab_size: int) -> mx.array:
    """Rows of any lengths as one array (B, L), ``NO_TOKEN`` before the shorter ones. ``ValueError`` for wrong ids."""
    L = max(map(len, rows))
    for row in rows:
        checked_ids(row, vocab_size)
    return mx.array(np.array([[NO_TOKEN] * (L - len(row)) + list(row) for row in rows], dtype=np.int32))


def _below(upper: Packed, n_upper: int, lower: Packed, n_lower: int) -> Packed:
    """Rows with so many slots in use, over others with theirs, all of which end at the same slot."""
    end = max(n_upper, n_lower)
    return tuple(
        mx.concatenate([mx.pad(x[:, :, :n], [(0, 0), (0, 0), (end - n, 0), (0, 0)]) for x, n in pair])
        for pair in (((up, n_upper), (low, n_lower)) for up, low in zip(upper, lower, strict=True))
    )
