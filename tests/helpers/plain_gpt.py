"""A GPT of one's own, as people write them, with faults to plant by name. No part of the package is used."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass
class PlainConfig:
    vocab_size: int = 61
    n_positions: int = 48
    width: int = 32
    layers: int = 2
    heads: int = 2
    dropout: float = 0.0
    rope: bool = False  # rotary positions instead of learned ones
    rms: bool = False  # RMSNorm instead of LayerNorm
    tied: bool = True


class PlainAttention(nn.Module):
    def __init__(self, config: PlainConfig, faults: Collection[str]):
        super().__init__()
        self.config, self.faults = config, {*faults}
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        if config.rope:
            self.rope = nn.RoPE(config.width // config.heads)

    def __call__(self, x: mx.array) -> mx.array:
        (B, T, C), H = x.shape, self.config.heads
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        if "attends-over-heads" in self.faults:  # the transpose is missing
            q, k, v = (a.reshape(B, T, H, C // H) for a in (q, k, v))
            return self.out((mx.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v).reshape(B, T, C))
        if "attends-over-batch" in self.faults:  # batch and time are exchanged
            q, k, v = (a.reshape(B, T, H, C // H).transpose(1, 2, 0, 3) for a in (q, k, v))
            z = self.pattern(q @ k.swapaxes(-1, -2), B) @ v
            return self.out(z.transpose(2, 0, 1, 3).reshape(B, T, C))
        wrong = {"heads-mixed-up", "heads-split-wrongly"} & self.faults
        q, k, v = (
            a.reshape(B, H, T, C // H)  # without a transpose
            if wrong or f"{name}-split-wrongly" in self.faults
            else a.reshape(B, T, H, C // H).transpose(0, 2, 1, 3)
            for name, a in zip(("queries", "keys", "values"), (q, k, v), strict=True)
        )
        if self.config.rope:
            q, k = self.rope(q), self.rope(k)
        scores = q @ k.swapaxes(-1, -2) / (C // H) ** 0.5
        pattern = self.pattern(scores, scores.shape[-1])
        z = self.dropout(pattern) @ v
        is_merged = self.faults & {"heads-mixed-up", "heads-merged-wrongly"}
        z = z.reshape(B, T, C) if is_merged else z.transpose(0, 2, 1, 3).reshape(B, T, C)
        return self.out(z)

    def pattern(self, scores: mx.array, T: int) -> mx.array:
        is_past = mx.arange(T)[:, None] >= mx.arange(T)[None]
        if "scores-over-length" in self.faults:
            scores = scores * 8 / T
        if "uniform" in self.faults:
            scores = scores * 0
        if "zero-mask" in self.faults:  # 0 instead of −inf
            return mx.softmax(scores * is_past, axis=-1)
        if "mask-after-softmax" in self.faults:
            return mx.softmax(scores, axis=-1) * is_past
        if "one-head-unmasked" in self.faults:
            is_past = is_past | (mx.arange(scores.shape[1]) == 0)[:, None, None]
        if "chunked" in self.faults:  # only tokens of the same eight
            is_past = is_past & (mx.arange(T)[:, None] // 8 == mx.arange(T)[None] // 8)
        if "no-mask" in self.faults or ("no-mask-in-training" in self.faults and self.training):
            is_past = mx.ones_like(is_past)
        if "inverted-mask" in self.faults:
            is_past = mx.arange(T)[:, None] <= mx.arange(T)[None]
        if "mask-shifted" in self.faults:  # one token of the future is seen
            is_past = mx.arange(T)[:, None] + 1 >= mx.arange(T)[None]
        if "cut" in self.faults:  # each layer sees two tokens
            is_past = is_past & (mx.arange(T)[None] > mx.arange(T)[:, None] - 2)
        if "only-itself" in self.faults:
            is_past = mx.arange(T)[:, None] == mx.arange(T)[None]
        weak = {"weak-mask": -8.0, "mask-of-minus-1": -1.0}
        later = next((value for fault, value in weak.items() if fault in self.faults), -mx.inf)
        masked = mx.where(is_past, scores, later)
        if "softmax-over-queries" in self.faults:
            return mx.softmax(masked, axis=-2)
        if "softmax-over-batch" in self.faults:
            return mx.softmax(mx.where(is_past, scores, -1e9), axis=0) * is_past
        return mx.softmax(masked, axis=-1)


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig, faults: Collection[str]):
        super().__init__()
        norm = nn.RMSNorm if config.rms else nn.LayerNorm
        self.faults = faults
        self.ln_1, self.ln_2 = norm(config.width), norm(config.width)
        self.attention = PlainAttention(config, faults)
        self.up, self.down = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x: mx.array) -> mx.array:
        if "residual-after-norm" in self.faults:
            x = self.ln_1(x)
            x = x + self.dropout(self.attention(x))
            x = self.ln_2(x)
            return x + self.dropout(self.down(nn.gelu(self.up(x))))
        if "stream-replaced-by-attention" in self.faults:
            x = self.dropout(self.attention(self.ln_1(x)))
        elif "attention-not-added" in self.faults:
            self.attention(self.ln_1(x))
        else:
            x = x + self.dropout(self.attention(self.ln_1(x)))
        if "mlp-not-added" in self.faults:
            return x
        if "stream-replaced-by-mlp" in self.faults:
            return self.dropout(self.down(nn.gelu(self.up(self.ln_2(x)))))
        return x + self.dropout(self.down(nn.gelu(self.up(self.ln_2(x)))))


class PlainGPT(nn.Module):
    """Ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: PlainConfig | None = None, faults: Collection[str] = (), seed: int = 0):
        super().__init__()
        mx.random.seed(seed)
        self.config = config = config or PlainConfig()
        self.faults = set(faults)
        self.wte = nn.Embedding(config.vocab_size, config.width)
        if not config.rope:
            self.wpe = nn.Embedding(config.n_positions, config.width)
        self.blocks = [PlainBlock(config, self.faults) for _ in range(config.layers)]
        self.ln_f = nn.RMSNorm(config.width) if config.rms else nn.LayerNorm(config.width)
        if not config.tied or "head-copied" in self.faults:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._seen = mx.zeros(config.width)
        self.apply(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p)
        if "head-copied" in self.faults:
            self.head.weight = self.wte.weight
        if "dropout-left-on" in self.faults:
            self.train = lambda mode=True: nn.Module.train(self, True)
        self.eval()

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.wte(ids)
        if "token-blind" in self.faults:
            x = x * 0
        if "wpe" in self and "position-blind" not in self.faults:
            x = x + self.wpe(self.positions(*ids.shape))
        if "noise" in self.faults:
            x = x + 0.02 * mx.random.normal(x.shape)
        if "batch-norm" in self.faults:
            x = x - 0.5 * x.mean(axis=0, keepdims=True)
        if "batch-mean" in self.faults:
            x = x - x.mean(axis=0, keepdims=True)
        if "remembers" in self.faults:
            x = x + self._seen
            self._seen = 0.5 * x[0, -1]
        for block in self.blocks[: -1 if "last-block-not-called" in self.faults else None]:
            x = block(x)
        if "mean-over-time" in self.faults:
            x = x - x.mean(axis=1, keepdims=True)
        x = self.ln_f(x)
        logits = self.head(x) if "head" in self else self.wte.as_linear(x)
        if "nan" in self.faults:
            logits = mx.where(mx.arange(ids.shape[1])[:, None] == 3, mx.nan, logits)
        if "last-row-scaled" in self.faults and len(logits) > 1:
            logits = mx.concatenate([logits[:-1], 1.1 * logits[-1:]])
        return mx.softmax(logits, axis=-1) if "returns-probabilities" in self.faults else logits

    def positions(self, B: int, T: int) -> mx.array:
        positions, P = mx.arange(T), self.config.n_positions
        if "positions-from-the-end" in self.faults:
            return positions[::-1]
        if "positions-scaled" in self.faults:
            return positions * (P - 1) // max(T - 1, 1)
        if "one-position" in self.faults:
            return positions * 0
        if "row-alone" in self.faults and B == 1:
            return mx.minimum(positions + 1, P - 1)
        if "positions-count-on" in self.faults:
            self.calls = getattr(self, "calls", 0) + 1
            return (positions + self.calls) % P
        return positions
