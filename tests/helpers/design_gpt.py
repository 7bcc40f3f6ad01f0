"""A GPT in MLX with the designs that papers since GPT-2 have proposed, each by a field of its configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass
class Design:
    vocab_size: int = 61
    n_positions: int = 48
    width: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4  # 1: multi-query (Shazeer 2019), fewer: grouped (Ainslie et al. 2023)
    positions: str = "learned"  # or sinusoidal, rope, alibi (Press et al. 2022), bias (Raffel et al. 2020)
    norm: type = nn.LayerNorm
    post_norm: bool = False  # as in the first GPT
    parallel: bool = False  # attention and MLP side by side (GPT-J)
    mlp: str = "gelu"  # or swiglu, relu2
    bias: bool = True
    tied: bool = True
    shared: bool = False  # one block, applied several times (ALBERT)
    qk_norm: bool = False
    cap: float = 0.0  # of the logits, by tanh (Gemma 2)
    scaled_embedding: bool = False  # by sqrt(width)
    std: float = 0.02


class Attention(nn.Module):
    def __init__(self, c: Design):
        super().__init__()
        self.c, d = c, c.width // c.heads
        self.q = nn.Linear(c.width, c.width, bias=c.bias)
        self.k, self.v = (nn.Linear(c.width, c.kv_heads * d, bias=c.bias) for _ in range(2))
        self.o = nn.Linear(c.width, c.width, bias=c.bias)
        if c.positions == "rope":
            self.rope = nn.RoPE(d)
        if c.positions == "bias":
            self.table = nn.Embedding(c.n_positions, c.heads)

    def __call__(self, x: mx.array) -> mx.array:
        (B, T, C), H = x.shape, self.c.heads
        q, k, v = (p(x).reshape(B, T, -1, C // H).swapaxes(1, 2) for p in (self.q, self.k, self.v))
        if self.c.qk_norm:
            q, k = (mx.fast.rms_norm(a, None, 1e-6) for a in (q, k))
        if self.c.positions == "rope":
            q, k = self.rope(q), self.rope(k)
        k, v = (mx.repeat(a, H // self.c.kv_heads, axis=1) for a in (k, v))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(C // H)
        distance = mx.arange(T)[:, None] - mx.arange(T)
        if self.c.positions == "alibi":
            scores = scores - distance * (2.0 ** (-8 / H * (mx.arange(H) + 1)))[:, None, None]
        if self.c.positions == "bias":
            scores = scores + self.table(mx.maximum(distance, 0)).transpose(2, 0, 1)
        pattern = mx.softmax(mx.where(distance >= 0, scores, mx.finfo(scores.dtype).min), axis=-1)
        return self.o((pattern @ v).swapaxes(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, c: Design):
        super().__init__()
        self.kind = c.mlp
        self.up, self.down = nn.Linear(c.width, 4 * c.width, bias=c.bias), nn.Linear(4 * c.width, c.width, bias=c.bias)
        if c.mlp == "swiglu":
            self.gate = nn.Linear(c.width, 4 * c.width, bias=c.bias)

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind == "swiglu":
            return self.down(nn.silu(self.gate(x)) * self.up(x))
        return self.down(mx.square(nn.relu(self.up(x))) if self.kind == "relu2" else nn.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c: Design):
        super().__init__()
        self.c, self.attention, self.mlp = c, Attention(c), MLP(c)
        self.norm_1, self.norm_2 = c.norm(c.width), c.norm(c.width)

    def __call__(self, x: mx.array) -> mx.array:
        if self.c.post_norm:
            x = self.norm_1(x + self.attention(x))
            return self.norm_2(x + self.mlp(x))
        if self.c.parallel:
            y = self.norm_1(x)
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class DesignGPT(nn.Module):
    """Ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Design, seed: int = 0):
        super().__init__()
        mx.random.seed(seed)
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.width)
        if c.positions == "learned":
            self.wpe = nn.Embedding(c.n_positions, c.width)
        self.blocks = [Block(c) for _ in range(1 if c.shared else c.layers)]
        if not c.post_norm:
            self.norm = c.norm(c.width)
        if not c.tied:
            self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.apply(lambda p: mx.random.normal(p.shape, scale=c.std) if p.ndim > 1 else p)
        self.eval()

    def __call__(self, ids: mx.array) -> mx.array:
        c, T = self.config, ids.shape[1]
        x = self.wte(ids) * (math.sqrt(c.width) if c.scaled_embedding else 1)
        if c.positions == "learned":
            x = x + self.wpe(mx.arange(T))
        if c.positions == "sinusoidal":
            angles = mx.arange(T)[:, None] * mx.exp(-math.log(1e4) * mx.arange(0, c.width, 2) / c.width)
            x = x + c.std * mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
        for _ in range(c.layers if c.shared else 1):
            for block in self.blocks:
                x = block(x)
        x = x if c.post_norm else self.norm(x)
        logits = self.wte.as_linear(x) if c.tied else self.head(x)
        return c.cap * mx.tanh(logits / c.cap) if c.cap else logits
