"""A GPT of pure functions on a dictionary of parameters, in NumPy, as picoGPT, and mistakes in it."""

from __future__ import annotations

import numpy as np

from .foreign_training import Given, P, V


def softmax(x: np.ndarray, axis: int | tuple[int, int] = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def layer_norm(x: np.ndarray, g: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return g * (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5) + b


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def gpt2(ids: np.ndarray, p: Given, n_head: int, mistake: str) -> np.ndarray:
    T = ids.shape[-1]
    positions = np.arange(T)[::-1] if mistake == "positions from the end" else np.arange(T)
    x = p["wte"][ids] + p["wpe"][positions]
    for block in p["blocks"]:
        norm_axis = -2 if mistake == "norm over time" else -1
        h = layer_norm(x, *block["ln_1"], axis=norm_axis)
        q, k, v = np.split(h @ block["c_attn"], 3, axis=-1)
        heads = []
        for qh, kh, vh in zip(*(np.split(a, n_head, axis=-1) for a in (q, k, v)), strict=True):
            mask = (1 - np.tri(T)) * (0 if mistake == "mask times 0" else -1e10)
            if mistake == "sees one ahead":
                mask = (1 - np.tri(T, k=1)) * -1e10
            axes = (-2, -1) if mistake == "softmax over everything" else -1
            heads.append(softmax(qh @ kh.swapaxes(-2, -1) / np.sqrt(qh.shape[-1]) + mask, axes) @ vh)
        x = x + np.concatenate(heads, axis=-1) @ block["c_proj"]
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
        return gpt2(ids, p, 2, mistake)

    def generate(ids: list[int], n: int) -> list[int]:
        ids = list(ids)
        for _ in range(n):
            seen = ids[:P] if mistake == "context cropped at the end" else ids[-P:]
            logits = gpt2(np.array(seen), p, 2, mistake)[-1]
            greedy = mistake == "always the argmax"
            draw = np.random.default_rng(0) if mistake == "seeded at each token" else rng
            ids.append(int(logits.argmax()) if greedy else int(draw.choice(V, p=softmax(logits.astype(np.float64)))))
        return ids

    return {"forward": forward, "sample": generate, "vocab_size": V, "n_positions": P}


MISTAKES = {
    "positions from the end": "length-dependent",
    "norm over time": "future-leak",
    "mask times 0": "future-leak",
    "sees one ahead": "future-leak",
    "softmax over everything": "future-leak",
    "context cropped at the end": "beyond-context",
    "always the argmax": "sampler-too-narrow",
    "seeded at each token": "draws-correlated",
}
