"""PlainGPT in NumPy with a cache of keys and values, as people write it, with faults to plant by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from .plain_gpt import PlainConfig

FAULTS = (
    "positions start again",
    "position one behind",
    "second token not stored",
    "keys not stored",
    "keeps eight tokens",
    "prefill not causal",
    "one cache for all layers",
    "last token of the prompt again",
    "values of the last token only",
    "not emptied",
)


class PlainCache:
    """``cached(ids, n_prompt) -> logits (T, V)``: the prompt at once, then one token after the other."""

    def __init__(self, weights: Mapping[str, np.ndarray], config: PlainConfig, fault: str = ""):
        self.weights, self.config, self.fault = weights, config, fault
        self.kept: list[Any] = []

    def __call__(self, ids: list[int], n_prompt: int) -> np.ndarray:
        if self.fault != "not emptied" or not self.kept:
            self.kept = [np.zeros((2, 0, self.config.width), np.float32)] * self.config.layers
        parts = [self.read(ids[:n_prompt], 0)]
        if self.fault == "last token of the prompt again":
            self.read(ids[n_prompt - 1 : n_prompt], n_prompt - 1)
        for t in range(n_prompt, len(ids)):
            starts = {"positions start again": t - n_prompt, "position one behind": t - 1}
            before = list(self.kept)
            parts.append(self.read(ids[t : t + 1], starts.get(self.fault, t)))
            if self.fault == "second token not stored" and t == n_prompt + 1:
                self.kept = before
        return np.concatenate(parts)

    def read(self, ids: list[int], start: int) -> np.ndarray:
        """Return the logits of new tokens, (T, V); store their keys and values."""
        w = self.weights
        x = w["wte.weight"][ids] + w["wpe.weight"][start : start + len(ids)]
        for layer in range(self.config.layers):
            x = x + self.attention(self.norm(x, f"blocks.{layer}.ln_1"), layer)
            up = self.linear(self.norm(x, f"blocks.{layer}.ln_2"), f"blocks.{layer}.up")
            x = x + self.linear(up * (1 + erf(up / math.sqrt(2))) / 2, f"blocks.{layer}.down")
        return self.norm(x, "ln_f") @ w["wte.weight" if self.config.tied else "head.weight"].T

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        q, k, v = np.split(self.linear(x, f"blocks.{layer}.attention.qkv"), 3, axis=-1)
        place = 0 if self.fault == "one cache for all layers" else layer
        keys, values = self.kept[place]
        if self.fault == "values of the last token only" and len(x) == 1:
            values = np.zeros_like(values)
        keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
        if self.fault == "keeps eight tokens" and len(x) == 1:
            keys, values = keys[-8:], values[-8:]
        if self.fault == "keys not stored" and len(x) == 1:
            self.kept[place] = np.stack([np.concatenate([self.kept[place][0], k * 0]), values])
        else:
            self.kept[place] = np.stack([keys, values])
        H, n = self.config.heads, len(keys)
        q, k, v = (a.reshape(len(a), H, -1).transpose(1, 0, 2) for a in (q, keys, values))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        if self.fault != "prefill not causal":
            scores = np.where(np.arange(n - len(x), n)[:, None] >= np.arange(n), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        z = scores / scores.sum(axis=-1, keepdims=True) @ v
        return self.linear(z.transpose(1, 0, 2).reshape(len(x), -1), f"blocks.{layer}.attention.out")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def erf(x: np.ndarray) -> np.ndarray:
    return np.array(mx.erf(mx.array(x)))
