"""A GPT written with einsum, with rotary positions and a cache, and mistakes in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .foreign_training import Given, V, functions


class EinsumGPT(nn.Module):
    def __init__(self, mistake: str, C: int = 32, H: int = 2, layers: int = 2):
        super().__init__()
        self.H, self.layers, self.mistake = H, layers, mistake
        normal = mx.random.normal
        self.embed = normal((V, C)) * 0.1
        self.wq, self.wk, self.wv = (normal((layers, C, H, C // H)) / C**0.5 for _ in range(3))
        self.wo = normal((layers, H, C // H, C)) / C**0.5
        self.w1, self.w2 = normal((layers, C, 4 * C)) / C**0.5, normal((layers, 4 * C, C)) / C**0.5 / 2
        self.norms = mx.ones((layers, 2, C))
        self.final = mx.ones(C)

    def rope(self, x: mx.array, start: int) -> mx.array:  # (B, T, H, D)
        start = 0 if self.mistake == "rope starts at 0" else start
        moved = mx.fast.rope(x.swapaxes(1, 2), x.shape[-1], traditional=False, base=1e4, scale=1.0, offset=start)
        return moved.swapaxes(1, 2)

    def __call__(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.embed[ids]
        for i in range(self.layers):
            start = cache[i][0].shape[1] if cache and cache[i] else 0
            h = mx.fast.rms_norm(x, self.norms[i, 0], 1e-5)
            q, k, v = (mx.einsum("btc,chd->bthd", h, w[i]) for w in (self.wq, self.wk, self.wv))
            q, k = self.rope(q, start), self.rope(k, start)
            if cache is not None:
                old = cache[i]
                if old:
                    k, v = mx.concatenate([old[0], k], axis=1), mx.concatenate([old[1], v], axis=1)
                cache[i] = old if old and self.mistake == "only the prompt is kept" else (k, v)
            scores = mx.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
            late = mx.arange(k.shape[1])[None] > mx.arange(start, start + q.shape[1])[:, None]
            weights = mx.softmax(mx.where(late, -mx.inf, scores), axis=-1)
            letters = "bhqk,bqhd->bkhd" if self.mistake == "letters swapped" else "bhqk,bkhd->bqhd"
            x = x + mx.einsum("bqhd,hdc->bqc", mx.einsum(letters, weights, v), self.wo[i])
            h = mx.fast.rms_norm(x, self.norms[i, 1], 1e-5)
            x = x + nn.silu(h @ self.w1[i]) @ self.w2[i]
        return mx.fast.rms_norm(x, self.final, 1e-5) @ self.embed.T


def einsum(mistake: str = "") -> Given:
    mx.random.seed(2)
    model = EinsumGPT(mistake)

    def cached(ids: list[int], n_prompt: int) -> mx.array:
        cache: list[Any] = [None] * model.layers
        out = [model(mx.array([ids[:n_prompt]]), cache)]
        out += [model(mx.array([[i]]), cache) for i in ids[n_prompt:]]
        return mx.concatenate(out, axis=1)[0]

    def reload() -> Callable[[np.ndarray], mx.array]:
        fresh = EinsumGPT(mistake)
        saved = dict(tree_flatten(model.parameters()))
        if mistake == "embedding not saved":
            saved = {name: value for name, value in saved.items() if name != "embed"}
        fresh.load_weights(list(saved.items()), strict=False)
        return lambda ids: fresh(mx.array(ids))

    if mistake == "letters swapped":  # its keys and queries must be as many
        return functions(model, mistake)
    return {**functions(model, mistake), "cached": cached, "reload": reload}


MISTAKES = {
    "rope starts at 0": "cache-mismatch",
    "only the prompt is kept": "cache-mismatch",
    "letters swapped": "future-leak",
    "embedding not saved": "reload-differs",
}
