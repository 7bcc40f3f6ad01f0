"""A GPT of ``mlx.nn.MultiHeadAttention``, in half precision too, and mistakes in it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .foreign_training import Given, P, V


class LibraryGPT(nn.Module):
    def __init__(self, mistake: str, dims: int = 32, heads: int = 4):
        super().__init__()
        self.embedding, self.position = nn.Embedding(V, dims), nn.Embedding(P, dims)
        self.attention = [nn.MultiHeadAttention(dims, heads, bias=True) for _ in range(2)]
        self.norms = [nn.LayerNorm(dims) for _ in range(5)]
        self.up, self.down = ([nn.Linear(*shape) for _ in range(2)] for shape in ((dims, 4 * dims), (4 * dims, dims)))
        self.head = nn.Linear(dims, V)
        self.mistake = mistake

    def mask(self, T: int, dtype: mx.Dtype) -> mx.array | None:
        if self.mistake == "no mask":
            return None
        if self.mistake == "tril of floats":  # a mask of floats is added
            return mx.tril(mx.ones((T, T), dtype))
        if self.mistake == "-1e9 in float16":  # it becomes −inf, and 0 * −inf is NaN
            return (1 - mx.tril(mx.ones((T, T), dtype))) * mx.array(-1e9, dtype)
        return nn.MultiHeadAttention.create_additive_causal_mask(T, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        T = x.shape[1]
        x = self.embedding(x) + self.position(mx.arange(T))
        for i, attention in enumerate(self.attention):
            y = self.norms[2 * i](x)
            if self.mistake == "attends over the batch":
                y = y.swapaxes(0, 1)
                y = attention(y, y, y, self.mask(y.shape[1], x.dtype)).swapaxes(0, 1)
            else:
                y = attention(y, y, y, self.mask(T, x.dtype))
            x = x + y
            x = x + self.down[i](nn.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[4](x))


def library(mistake: str = "", dtype: mx.Dtype = mx.float32) -> Given:
    mx.random.seed(5)
    model = LibraryGPT(mistake)
    model.set_dtype(mx.float16 if "float16" in mistake else dtype)
    return {"forward": model, "vocab_size": V, "n_positions": P}


MISTAKES = {
    "no mask": "future-leak",
    "tril of floats": "future-leak",
    "-1e9 in float16": "non-finite",
    "attends over the batch": "batch-leak",
}
