"""A GPT with one head after another in a list, as in lectures, and the mistakes that people make in it."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from .foreign_training import Given, P, V, functions


class Head(nn.Module):
    def __init__(self, n_embd: int, size: int, mistake: str):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(n_embd, size, bias=False) for _ in range(3))
        self.mistake = mistake

    def __call__(self, x: mx.array) -> mx.array:
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(0, 2, 1) / math.sqrt(x.shape[-1])
        tril = mx.tril(mx.ones((T, T)))
        if self.mistake == "mask multiplied":
            return mx.softmax(scores * tril, axis=-1) @ self.value(x)
        if self.mistake == "mask after the softmax":
            return (mx.softmax(scores, axis=-1) * tril) @ self.value(x)
        if self.mistake == "triu for tril":
            tril = mx.triu(mx.ones((T, T)))
        axis = 1 if self.mistake == "softmax over axis 1" else 2
        return mx.softmax(mx.where(tril == 0, -1e9, scores), axis=axis) @ self.value(x)


class Lecture(nn.Module):
    def __init__(self, mistake: str, n_embd: int = 32, n_head: int = 2, n_layer: int = 1):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, n_embd), nn.Embedding(P, n_embd)
        self.heads = [[Head(n_embd, n_embd // n_head, mistake) for _ in range(n_head)] for _ in range(n_layer)]
        self.ffwd = [nn.Sequential(nn.Linear(n_embd, 64), nn.ReLU(), nn.Linear(64, n_embd)) for _ in range(n_layer)]
        self.ln1, self.ln2 = ([nn.LayerNorm(n_embd) for _ in range(n_layer)] for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, V)
        self.dropout, self.mistake = nn.Dropout(0.1), mistake
        self.train(mistake == "dropout left on")

    def __call__(self, idx: mx.array) -> mx.array:
        T = idx.shape[1]
        positions = mx.zeros(T, mx.int32) if self.mistake == "position 0 everywhere" else mx.arange(T)
        x = self.wte(idx)
        if self.mistake != "positions forgotten":
            x = x + self.wpe(positions)
        for heads, ffwd, ln1, ln2 in zip(self.heads, self.ffwd, self.ln1, self.ln2, strict=True):
            h = ln1(x)
            x = x + self.dropout(mx.concatenate([head(h) for head in heads], axis=-1))
            x = x + ffwd(ln2(x))
        return self.head(self.ln_f(x))


def lecture(mistake: str = "") -> Given:
    mx.random.seed(1)
    model = Lecture(mistake)
    given = functions(model, mistake)

    def generate(ids: list[int], n: int, temperature: float = 1.0, top_k: int = 0) -> list[int]:
        idx = mx.array([ids])
        for _ in range(n):
            seen = idx if mistake == "context not cropped" else idx[:, -P:]
            logits = model(seen)[:, 0 if mistake == "logits of position 0" else -1]
            logits = logits * temperature if mistake == "times the temperature" else logits / max(temperature, 1e-6)
            if top_k and mistake == "rank for id":  # the index into the sorted logits is taken for an id
                new = mx.random.categorical(-mx.sort(-logits, axis=-1)[:, :top_k])
            else:
                if top_k:
                    kth = mx.sort(logits, axis=-1)[:, top_k - 1 if mistake == "k lowest" else -top_k]
                    out = logits > kth if mistake == "k lowest" else logits < kth
                    logits = mx.where(out, -mx.inf, logits)
                new = mx.random.categorical(mx.softmax(logits) if mistake == "softmax before drawing" else logits)
            idx = mx.concatenate([idx, new[:, None]], axis=1)
        return idx[0].tolist()

    return {**given, "sample": generate, "sample_settings": ["temperature", "top_k"]}


MISTAKES = {
    "mask multiplied": "future-leak",
    "mask after the softmax": "future-leak",
    "triu for tril": "future-leak",
    "softmax over axis 1": "future-leak",
    "dropout left on": "not-deterministic",
    "position 0 everywhere": "position-blind",
    "positions forgotten": "position-blind",
    "context not cropped": "beyond-context",
    "logits of position 0": "sampler-not-the-model|prompt-ignored",
    "times the temperature": "setting-inverted",
    "rank for id": "setting-wrong",
    "k lowest": "setting-inverted",
    "softmax before drawing": "probabilities-as-logits",
    "softmax before the loss": "loss-not-cross-entropy",
    "sum of the losses": "loss-not-the-mean",
    "loss shifts again": "targets-shifted-twice",
    "targets are the inputs": "targets-not-shifted",
    "lr 1": "learning-rate-too-high",
    "lr 1e-8": "learning-rate-too-low",
    "AdamW as MLX makes it": "no-bias-correction",
    "freezes all but the head": "parameters-frozen",
    "update forgotten": "step-without-effect",
}
