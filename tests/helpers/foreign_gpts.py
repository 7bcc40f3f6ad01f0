"""GPTs as different people write them, in MLX and NumPy, each healthy or with a mistake that people ask about.

Each function returns the arguments of ``examine``; ``mistake`` is "" or one of the names in its ``MISTAKES``. They
share no code but the text, the sampler and the optimizer's step, and use nothing of the package's models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.tinyworld.stories import generate_stories

Given = dict[str, Any]
P = 24  # context
TEXT = "\n".join(generate_stories(200, seed=3))
CHARACTERS = sorted(set(TEXT))
V = len(CHARACTERS)
IDS = np.array([CHARACTERS.index(c) for c in TEXT], np.int32)


def batches(shift: int = 1, B: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(0, len(IDS) - P - 3, (B, 1)) + np.arange(P)
        yield IDS[rows], IDS[rows + shift]


def functions(model: nn.Module, mistake: str = "", lr: float = 1e-3) -> Given:
    """Return what a user of ``mlx.optimizers`` has: a loss, a step, parameters."""

    def mean_loss(x: mx.array, y: mx.array) -> mx.array:
        logits = model(x).astype(mx.float32)
        if mistake == "softmax before the loss":
            logits = mx.softmax(logits, axis=-1)
        if mistake == "loss shifts again":
            logits, y = logits[:, :-1], y[:, 1:]
        how = "sum" if mistake == "sum of the losses" else "mean"
        return nn.losses.cross_entropy(logits, y, reduction=how)

    value_and_grad = nn.value_and_grad(model, mean_loss)
    rate = {"lr 1": 1.0, "lr 1e-8": 1e-8}.get(mistake, lr)

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        corrected = mistake != "AdamW as MLX makes it"
        optimizer = optim.AdamW(rate, weight_decay=0.01, bias_correction=corrected)
        if mistake == "freezes all but the head":
            model.freeze()
            model.head.unfreeze()

        def step(x: np.ndarray, y: np.ndarray) -> float:
            loss, gradient = value_and_grad(mx.array(x), mx.array(y))
            if mistake != "update forgotten":
                optimizer.update(model, gradient)
            mx.eval(model.parameters(), optimizer.state)
            return loss.item()

        return step

    def parameters() -> Given:
        return {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(model.parameters())}

    def load(values: Given) -> None:
        model.update(tree_unflatten([(k, mx.array(v)) for k, v in values.items()]))

    return {
        "forward": lambda ids: model(mx.array(ids)),
        "loss": lambda x, y: mean_loss(mx.array(x), mx.array(y)).item(),
        "parameters": parameters,
        "load_parameters": load,
        "new_step": new_step,
        "step": new_step(),
        "learning_rate": rate,
        "batches": (lambda: batches(0)) if mistake == "targets are the inputs" else batches,
        "train_ids": IDS,
        "vocab_size": V,
        "n_positions": P,
    }


# One head after another, in a list, as in lectures --------------------------------------------------------------------


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
    def __init__(self, mistake: str, n_embd: int = 32, n_head: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, n_embd), nn.Embedding(P, n_embd)
        self.heads = [[Head(n_embd, n_embd // n_head, mistake) for _ in range(n_head)] for _ in range(2)]
        self.ffwd = [nn.Sequential(nn.Linear(n_embd, 64), nn.ReLU(), nn.Linear(64, n_embd)) for _ in range(2)]
        self.ln1, self.ln2 = ([nn.LayerNorm(n_embd) for _ in range(2)] for _ in range(2))
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


# einsum, and a cache --------------------------------------------------------------------------------------------------


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


# A dictionary of parameters and pure functions, as in picoGPT ---------------------------------------------------------


def softmax(x: np.ndarray, axis: int | None = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def layer_norm(x: np.ndarray, g: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return g * (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5) + b


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gpt2(ids: list[int], p: Given, n_head: int, mistake: str) -> np.ndarray:
    T = len(ids)
    positions = np.arange(T)[::-1] if mistake == "positions from the end" else np.arange(T)
    x = p["wte"][ids] + p["wpe"][positions]
    for block in p["blocks"]:
        norm_axis = 0 if mistake == "norm over time" else -1
        h = layer_norm(x, *block["ln_1"], axis=norm_axis)
        q, k, v = np.split(h @ block["c_attn"], 3, axis=-1)
        heads = []
        for qh, kh, vh in zip(*(np.split(a, n_head, axis=-1) for a in (q, k, v)), strict=True):
            mask = (1 - np.tri(T)) * (0 if mistake == "mask times 0" else -1e10)
            if mistake == "sees one ahead":
                mask = (1 - np.tri(T, k=1)) * -1e10
            whole = None if mistake == "softmax over everything" else -1
            heads.append(softmax(qh @ kh.T / np.sqrt(qh.shape[-1]) + mask, whole) @ vh)
        x = x + np.hstack(heads) @ block["c_proj"]
        x = x + gelu(layer_norm(x, *block["ln_2"]) @ block["c_fc"]) @ block["c_mlp"]
    return layer_norm(x, *p["ln_f"]) @ p["wte"].T


def pico(mistake: str = "", C: int = 32) -> Given:
    rng = np.random.default_rng(4)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    norm = (np.ones(C, np.float32), np.zeros(C, np.float32))
    block = {"ln_1": norm, "ln_2": norm, "c_attn": normal(C, 3 * C), "c_proj": normal(C, C)}
    block |= {"c_fc": normal(C, 4 * C), "c_mlp": normal(4 * C, C)}
    p = {"wte": 4 * normal(V, C), "wpe": normal(P, C), "blocks": [block], "ln_f": norm}

    def forward(ids: np.ndarray) -> np.ndarray:
        return np.stack([gpt2(list(row), p, 2, mistake) for row in ids])

    def generate(ids: list[int], n: int) -> list[int]:
        ids = list(ids)
        for _ in range(n):
            seen = ids[:P] if mistake == "context cropped at the end" else ids[-P:]
            logits = gpt2(seen, p, 2, mistake)[-1]
            greedy = mistake == "always the argmax"
            draw = np.random.default_rng(0) if mistake == "seeded at each token" else rng
            ids.append(int(logits.argmax()) if greedy else int(draw.choice(V, p=softmax(logits.astype(np.float64)))))
        return ids

    return {"forward": forward, "sample": generate, "vocab_size": V, "n_positions": P}


# mlx.nn.MultiHeadAttention, and half precision ------------------------------------------------------------------------


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


# Each mistake, and the codes that name it -----------------------------------------------------------------------------

PEOPLE: dict[str, Callable[[str], Given]] = {"lecture": lecture, "einsum": einsum, "pico": pico, "library": library}
MISTAKES: dict[tuple[str, str], str] = {
    ("lecture", "mask multiplied"): "future-leak",
    ("lecture", "mask after the softmax"): "future-leak",
    ("lecture", "triu for tril"): "future-leak",
    ("lecture", "softmax over axis 1"): "future-leak",
    ("lecture", "dropout left on"): "not-deterministic",
    ("lecture", "position 0 everywhere"): "position-blind",
    ("lecture", "positions forgotten"): "position-blind",
    ("lecture", "context not cropped"): "beyond-context",
    ("lecture", "logits of position 0"): "sampler-not-the-model|prompt-ignored",
    ("lecture", "times the temperature"): "setting-inverted",
    ("lecture", "rank for id"): "setting-wrong",
    ("lecture", "k lowest"): "setting-inverted",
    ("lecture", "softmax before drawing"): "probabilities-as-logits",
    ("lecture", "softmax before the loss"): "loss-not-cross-entropy",
    ("lecture", "sum of the losses"): "loss-not-the-mean",
    ("lecture", "loss shifts again"): "targets-shifted-twice",
    ("lecture", "targets are the inputs"): "targets-not-shifted",
    ("lecture", "lr 1"): "learning-rate-too-high",
    ("lecture", "lr 1e-8"): "learning-rate-too-low",
    ("lecture", "AdamW as MLX makes it"): "no-bias-correction",
    ("lecture", "freezes all but the head"): "parameters-frozen",
    ("lecture", "update forgotten"): "step-without-effect",
    ("einsum", "rope starts at 0"): "cache-mismatch",
    ("einsum", "only the prompt is kept"): "cache-mismatch",
    ("einsum", "letters swapped"): "future-leak",
    ("einsum", "embedding not saved"): "reload-differs",
    ("pico", "positions from the end"): "length-dependent",
    ("pico", "norm over time"): "future-leak",
    ("pico", "mask times 0"): "future-leak",
    ("pico", "sees one ahead"): "future-leak",
    ("pico", "softmax over everything"): "future-leak",
    ("pico", "context cropped at the end"): "beyond-context",
    ("pico", "always the argmax"): "sampler-too-narrow",
    ("pico", "seeded at each token"): "draws-correlated",
    ("library", "no mask"): "future-leak",
    ("library", "tril of floats"): "future-leak",
    ("library", "-1e9 in float16"): "non-finite",
    ("library", "attends over the batch"): "batch-leak",
}
