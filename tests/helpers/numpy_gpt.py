"""A GPT in NumPy with its parameters in a dict, as people write them, with faults of weights to plant by name."""

from __future__ import annotations

from typing import Any

import numpy as np

V, P, C, H, L = 40, 32, 32, 4, 2
SHAPES = {"wq": (C, C), "wk": (C, C), "wv": (C, C), "wo": (C, C), "up": (C, 4 * C), "down": (4 * C, C)}


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp_x / exp_x.sum(axis=-1, keepdims=True)


class NumpyGPT:
    """Ids (B, T) -> logits (B, T, V). Parameters are named ``h.0.wq``, or ``wq0`` where ``flat``."""

    def __init__(self, fault: str = "", flat: bool = False, tied: bool = True):
        self.fault, self.name = fault, "{1}{0}" if flat else "h.{0}.{1}"
        rng = np.random.default_rng(0)
        shapes = {"wte": (V, C), "wpe": (P, C), "norm_f": (C,), **({} if tied else {"head": (C, V)})}
        shapes |= {self.name.format(i, name): shape for i in range(L) for name, shape in SHAPES.items()}
        self.p = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        self.p["norm_f"] += 1
        if fault == "head is a copy":
            self.p["head"] = self.p["wte"].T.copy()

    def forward(self, ids: np.ndarray) -> np.ndarray:
        x = self.p["wte"][ids] + self.p["wpe"][: ids.shape[1]]
        x = norm(x) * self.p["norm_f"] if self.fault == "norm of the embeddings, by design" else x
        for i in range(L):
            w = {name: self.p[self.name.format(i, name)] for name in SHAPES}
            z = self.attention(norm(x), w)
            x = {"stream after norm": norm(x), "no stream": 0 * x}.get(self.fault, x)
            x = 0 * x if self.fault == "attention without a stream" else x
            x = x if (self.fault, i) == ("attention dropped", 1) else x + z @ w["wo"]
            hidden = np.maximum(norm(x) @ w["up"], 0)
            x = {"stream after norm": norm(x), "no stream": 0 * x}.get(self.fault, x)
            x = 0 * x if (self.fault, i) == ("MLP without a stream", 1) else x
            x = x if (self.fault, i) == ("MLP dropped", 1) else x + hidden @ w["down"]
            x = norm(x) if self.fault == "norm after the addition, by design" else x
        return norm(x) * self.p["norm_f"] @ self.p.get("head", self.p["wte"].T)

    def attention(self, x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        B, T, _ = x.shape
        q, k, v = (x @ w[name] for name in ("wq", "wk", "wv"))
        if self.fault in ("split wrongly", "split and merged wrongly"):
            q, k, v = (a.reshape(B, H, T, C // H) for a in (q, k, v))
        elif self.fault == "not transposed":
            q, k, v = (a.reshape(B, T, H, C // H) for a in (q, k, v))
        else:
            q, k, v = (a.reshape(B, T, H, C // H).transpose(0, 2, 1, 3) for a in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(C // H)
        z = softmax(np.where(np.tri(scores.shape[-1], dtype=bool), scores, -1e30)) @ v
        is_merged = self.fault in ("merged wrongly", "split and merged wrongly", "not transposed")
        return z.reshape(B, T, C) if is_merged else z.transpose(0, 2, 1, 3).reshape(B, T, C)

    def arguments(self) -> dict[str, Any]:
        return {
            "forward": self.forward,
            "vocab_size": V,
            "n_positions": P,
            "parameters": lambda: {name: array.copy() for name, array in self.p.items()},
            "load_parameters": self.p.update,
        }
