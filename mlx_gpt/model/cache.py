"""The key/value cache of one layer: what earlier tokens answered and gave, kept so that it is computed once."""

from __future__ import annotations

import mlx.core as mx

GROWTH = 256  # slots by which a cache grows; a compiled step is traced anew for each length
FIRST = 64  # slots of the first, which are doubled up to ``GROWTH``: a step reads all slots, used or not

Packed = tuple[mx.array, ...]  # keys or values as they are kept: (B, H, slots, D), or quantized, with scales and biases


class KVCache:
    """Keys and values of the tokens so far, each token's in a slot, in the order of the text.

    ``offset`` counts the slots in use; the next token takes that one. It is an int or, inside a compiled step, where no
    shape may change, an array. ``padding`` (B,) says how many slots at the beginning of each row hold no token, where
    rows of different lengths stand side by side. ``bits`` keeps less: 16 half precision, 8 and 4 quantized. ``mask`` is
    set where all layers share one.
    """

    def __init__(self, n_positions: int, bits: int | None = None, padding: mx.array | None = None):
        self.n_positions = n_positions
        self.bits = bits
        self.padding = padding
        self.mask: mx.array | str | None = None
        self.offset: int | mx.array = 0
        self.keys: Packed = ()
        self.values: Packed = ()

    def extend(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array | str]:
        """Append the keys and values of T new tokens, (B, H, T, D) each: all of them, (B, H, S, D), and the mask."""
        T, start = k.shape[2], self.offset
        if isinstance(start, int):
            self._keep_room(start + T, k, v)
        mask = self.make_mask(T) if self.mask is None else self.mask
        self.keys = self._write(self.keys, k, start)
        self.values = self._write(self.values, v, start)
        self.offset = start + T
        S = self.offset if isinstance(self.offset, int) else self.n_slots
        return self._read(self.keys, S, k.dtype), self._read(self.values, S, v.dtype), mask

    def make_mask(self, T: int) -> mx.array | str:
        """Who may see whom, once T tokens more are there: True where slot j holds a token, and none of the future.

        (T, S), or (B, 1, T, S) with padding. A padding slot sees itself, so that its softmax is over something.
        """
        if self.is_plain:
            return "causal"
        S = self.offset + T if isinstance(self.offset, int) else self.n_slots
        queries, keys = self.offset + mx.arange(T)[:, None], mx.arange(S)
        if self.padding is None:
            return keys <= queries
        return ((keys <= queries) & (keys >= self.padding[:, None, None, None])) | (keys == queries)

    def positions(self, T: int) -> mx.array:
        """Where the next T tokens stand in their texts: (T,), or (B, T) with padding.

        Never past the last: MLX checks no index, and a row that is over may run on beside the others.
        """
        slots = self.offset + mx.arange(T)
        if self.padding is not None:
            slots = slots - self.padding[:, None]
        return mx.clip(slots, 0, self.n_positions - 1)

    @property
    def is_plain(self) -> bool:
        """Whether slots are positions, known here and now: outside of a compiled step, and without padding."""
        return isinstance(self.offset, int) and self.padding is None

    @property
    def n_slots(self) -> int:
        """How many tokens there is room for."""
        return self.keys[0].shape[2] if self.keys else 0

    def grow(self, n: int) -> None:
        """See to room for at least n tokens."""
        step = GROWTH
        while step > FIRST and n <= step // 2:
            step //= 2
        slots = -(-n // step) * step
        slots = min(slots, self.n_positions) if n <= self.n_positions else slots
        if n > self.n_slots:
            self.keys, self.values = _longer(self.keys, slots), _longer(self.values, slots)

    def _keep_room(self, n: int, k: mx.array, v: mx.array) -> None:
        if not self.keys:
            self.keys, self.values = self._pack_none(k), self._pack_none(v)
        self.grow(n)

    def _write(self, kept: Packed, new: mx.array, start: int | mx.array) -> Packed:
        place = mx.array(start).reshape(1)
        return tuple(mx.slice_update(k, n, place, axes=(2,)) for k, n in zip(kept, self._pack(new), strict=True))

    def _pack(self, x: mx.array) -> Packed:
        if self.bits in (8, 4):
            return tuple(mx.quantize(x, group_size=_group_size(x.shape[-1]), bits=self.bits))
        return (x.astype(mx.float16) if self.bits == 16 and x.dtype == mx.float32 else x,)

    def _pack_none(self, like: mx.array) -> Packed:
        # of a token, or MLX would quantize an empty array, which divides by zero on CUDA
        return tuple(part[:, :, :0] for part in self._pack(like[:, :, :1]))

    def _read(self, kept: Packed, S: int, dtype: mx.Dtype) -> mx.array:
        x, *scales = (part[:, :, :S] for part in kept)
        if self.bits in (8, 4):
            D = x.shape[-1] * 32 // self.bits
            return mx.dequantize(x, scales[0], scales[1], group_size=_group_size(D), bits=self.bits)
        return x.astype(dtype)


def _group_size(D: int) -> int:
    """How many numbers of a head share a scale when quantized."""
    return 64 if D % 64 == 0 else 32


def _longer(kept: Packed, slots: int) -> Packed:
    return tuple(mx.pad(part, [(0, 0), (0, 0), (0, slots - part.shape[2]), (0, 0)]) for part in kept)
