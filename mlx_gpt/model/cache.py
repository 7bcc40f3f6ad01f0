"""The key/value cache of one layer."""

from __future__ import annotations

import mlx.core as mx

GROWTH = 256  # slots by which a cache grows; a compiled step is traced again for each length
FIRST = 64  # slots at first, doubled up to ``GROWTH``: a step reads all slots, used or not

Packed = tuple[mx.array, ...]  # stored keys or values (B, H, slots, D); if quantized, with scales and biases


class KVCache:
    """Keys and values of earlier tokens, one slot per token.

    ``offset`` is the number of slots in use: an int or, inside a compiled step, an array. ``padding`` (B,) is the
    number of empty slots at the start of each row of a batch of prompts of different lengths. ``bits`` is 16 for half
    precision, 8 or 4 for quantized storage. ``mask`` and ``place``, if set, replace those that this layer would make.
    """

    def __init__(self, n_positions: int, bits: int | None = None, padding: mx.array | None = None):
        self.n_positions = n_positions
        self.bits = bits
        self.padding = padding
        self.mask: mx.array | str | None = None
        self.place: mx.array | None = None  # the first slot of the next tokens, (1,), or whether it is one's, (S, 1)
        self.offset: int | mx.array = 0
        self.keys: Packed = ()
        self.values: Packed = ()

    def extend(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array | str]:
        """Append keys and values of T tokens, (B, H, T, D) each. Returns all of them, (B, H, S, D), and the mask."""
        T, start = k.shape[2], self.offset
        if isinstance(start, int):
            self._reserve(start + T, k, v)
        mask = self.make_mask(T) if self.mask is None else self.mask
        place = mx.array(start).reshape(1) if self.place is None else self.place
        self.keys, self.values = self._write(self.keys, k, place), self._write(self.values, v, place)
        self.offset = start + T
        S = self.offset if isinstance(self.offset, int) else self.n_slots
        return self._read(self.keys, S, k.dtype), self._read(self.values, S, v.dtype), mask

    def make_mask(self, T: int) -> mx.array | str:
        """Return the mask for T more tokens: "causal", or a boolean (T, S), with padding (B, 1, T, S).

        True where the slot holds a token that is not in the query's future. A padding slot attends to itself, since a
        softmax over masked scores only would be NaN.
        """
        if self.is_plain:
            return "causal"
        S = self.offset + T if isinstance(self.offset, int) else self.n_slots
        queries, keys = self.offset + mx.arange(T)[:, None], mx.arange(S)
        if self.padding is None:
            return keys <= queries
        return ((keys <= queries) & (keys >= self.padding[:, None, None, None])) | (keys == queries)

    def positions(self, T: int) -> mx.array:
        """Return the positions of the next T tokens: (T,), or (B, T) with padding.

        Clipped to the last position, since MLX does not check indices and a finished row of a batch continues.
        """
        slots = self.offset + mx.arange(T)
        if self.padding is not None:
            slots = slots - self.padding[:, None]
        return mx.clip(slots, 0, self.n_positions - 1)

    @property
    def is_plain(self) -> bool:
        """True if slots equal positions: without padding, outside a compiled step."""
        return isinstance(self.offset, int) and self.padding is None

    @property
    def n_slots(self) -> int:
        """Allocated slots."""
        return self.keys[0].shape[2] if self.keys else 0

    def grow(self, n: int) -> None:
        """Allocate at least n slots."""
        step = GROWTH
        while step > FIRST and n <= step // 2:
            step //= 2
        slots = -(-n // step) * step
        slots = min(slots, self.n_positions) if n <= self.n_positions else slots
        if n > self.n_slots:
            self.keys, self.values = _longer(self.keys, slots), _longer(self.values, slots)

    def _reserve(self, n: int, k: mx.array, v: mx.array) -> None:
        if not self.keys:
            self.keys, self.values = self._pack_empty(k), self._pack_empty(v)
        self.grow(n)

    def _write(self, stored: Packed, new: mx.array, place: mx.array) -> Packed:
        if place.dtype == mx.bool_:
            return tuple(mx.where(place, n, k) for k, n in zip(stored, self._pack(new), strict=True))
        return tuple(mx.slice_update(k, n, place, axes=(2,)) for k, n in zip(stored, self._pack(new), strict=True))

    def _pack(self, x: mx.array) -> Packed:
        if self.bits in (8, 4):
            return tuple(mx.quantize(x, group_size=_group_size(x.shape[-1]), bits=self.bits))
        return (x.astype(mx.float16) if self.bits == 16 and x.dtype == mx.float32 else x,)

    def _pack_empty(self, like: mx.array) -> Packed:
        # Packs one token and drops it: quantizing an empty array divides by zero on CUDA.
        return tuple(part[:, :, :0] for part in self._pack(like[:, :, :1]))

    def _read(self, stored: Packed, S: int, dtype: mx.Dtype) -> mx.array:
        x, *scales = (part[:, :, :S] for part in stored)
        if self.bits in (8, 4):
            D = x.shape[-1] * 32 // self.bits
            return mx.dequantize(x, scales[0], scales[1], group_size=_group_size(D), bits=self.bits)
        return x.astype(dtype)


def _group_size(D: int) -> int:
    """Return the quantization group for heads of width D."""
    return 64 if D % 64 == 0 else 32


def _longer(stored: Packed, slots: int) -> Packed:
    return tuple(mx.pad(part, [(0, 0), (0, 0), (0, slots - part.shape[2]), (0, 0)]) for part in stored)
