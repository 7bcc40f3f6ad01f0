"""A small forward pass and samplers in plain NumPy, as people write them, with faults to plant by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Forward = Callable[[np.ndarray], np.ndarray]
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")


def small_forward(V: int = 31, P: int = 24, scale: float = 1.0, seed: int = 0) -> Forward:
    """Return ids (B, T) -> logits (B, T, V): a causal mean of tokens and positions, then one layer."""
    rng = np.random.default_rng(seed)
    wte, wpe, out = rng.normal(size=(V, 16)), rng.normal(size=(P, 16)), rng.normal(size=(16, V))

    def forward(ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        x = wte[ids] + wpe[: ids.shape[1]]
        x = x + np.cumsum(x, axis=1) / np.sqrt(np.arange(1, ids.shape[1] + 1))[:, None]
        return (np.tanh(x) @ out * scale / 4).astype(np.float32)

    return forward


def softmax(logits: np.ndarray) -> np.ndarray:
    exp_logits = np.exp(logits - logits.max())
    return exp_logits / exp_logits.sum()


@dataclass
class PlainSampler:
    """``sample(ids, n, **settings)``, with one fault or none."""

    forward: Forward
    V: int
    P: int
    fault: str = ""  # or several, joined by " + "
    seed: int = 0
    draw: str = "numpy"  # the library that draws

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.faults = {*self.fault.split(" + ")}

    def __call__(
        self,
        ids: list[int],
        n: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> list[int]:
        text, new = list(ids), []
        if "appends to the prompt" in self.faults:
            text = ids
        rng = np.random.default_rng(1) if "seeded" in self.faults else self.rng
        noise, u = rng.gumbel(size=self.V), rng.random()
        for _ in range(n):
            logits = self.logits(text, new, len(ids)).astype(np.float64)
            logits = self.penalize(logits, text, repetition_penalty)
            i = self.choose(logits, temperature, top_k, top_p, rng, noise, u)
            text.append(i)
            new.append(i)
        if "returns another prompt" in self.faults:
            return [0, *text[1:]]
        if "returns the last of its text" in self.faults:
            return text[-self.P :]
        if "returns the prompt" in self.faults:
            return text
        return np.array(new) if "returns an array" in self.faults else new  # type: ignore[return-value]

    def logits(self, text: list[int], new: list[int], n_prompt: int) -> np.ndarray:
        read, place = [i % self.V for i in text], -1
        if "prompt-ignored" in self.faults:
            read = [0, *new]
        if "last token only" in self.faults:
            read = read[-1:]
        if "last 8 tokens" in self.faults:
            read = read[-8:]
        if "prompt's last token" in self.faults:
            read = read[n_prompt - 1 :]
        if "prompt alone" in self.faults:
            read = read[:n_prompt]
        if "restarts" in self.faults and len(read) > self.P:
            read = read[self.P :]
        if "beyond-context" in self.faults and len(read) > self.P:
            raise IndexError("index out of range in self")
        if "positions stay" in self.faults:
            read = read[: self.P]
        if "previous position" in self.faults and len(read) > 1:
            place = -2
        return self.forward(np.array([read[-self.P :]], np.int32))[0, place]

    def penalize(self, logits: np.ndarray, text: list[int], penalty: float) -> np.ndarray:
        ids, counts = np.unique([i % self.V for i in text], return_counts=True)
        if "penalty ignored" in self.faults:
            return logits
        if "penalty-compounds" in self.faults:
            penalty = penalty**counts
        values = logits[ids]
        down = np.where(values < 0, values * penalty, values / penalty)
        logits[ids] = values / penalty if "penalty-rewards-repetition" in self.faults else down
        return logits

    def choose(
        self, logits: np.ndarray, temperature: float, k: int, p: float, rng: Any, noise: np.ndarray, u: float
    ) -> int:
        if temperature == 0 or "sampler-too-narrow" in self.faults:
            return int(logits.argmax())
        if "probabilities-as-logits" in self.faults:
            logits = softmax(logits)
        if "half the temperature" in self.faults:
            temperature /= 2
        if "temperature ignored" in self.faults:
            temperature = 1
        logits = logits / temperature if "temperature inverted" not in self.faults else logits * temperature
        logits = self.top_p(self.top_k(logits, k), p)
        if "top_k uniform" in self.faults and k:
            logits = np.where(logits == -np.inf, logits, 0.0)
        if "softmax twice" in self.faults:  # what was cut stays so
            logits = np.where(logits == -np.inf, -np.inf, softmax(logits))
        probabilities = softmax(logits)
        if "a fifth uniform" in self.faults:
            probabilities = 0.8 * probabilities + 0.2 / self.V
        if "same noise" in self.faults:
            return int((logits + noise).argmax())
        if "same random number" in self.faults:
            return min(int((probabilities.cumsum() < u).sum()), self.V - 1)
        i = self.drawn(logits, probabilities, rng)
        if "next id" in self.faults:
            return min(i + 1, self.V - 1)
        return i + 1 if "ids plus one" in self.faults else i

    def drawn(self, logits: np.ndarray, probabilities: np.ndarray, rng: Any) -> int:
        key = 0 if "same key" in self.faults else int(rng.integers(1 << 30))
        if self.draw == "mlx":
            import mlx.core as mx

            return int(mx.random.categorical(mx.array(logits, mx.float32), key=mx.random.key(key)).item())
        if self.draw == "torch":
            import torch

            generator = torch.Generator().manual_seed(key)
            return int(torch.multinomial(torch.tensor(probabilities), 1, generator=generator))
        return int(rng.choice(self.V, p=probabilities))

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        if "top_k 0 keeps one" in self.faults:
            k = max(k, 1)
        if k == 0 or "top_k ignored" in self.faults:
            return logits
        k = min(k, self.V) + ("top_k one more" in self.faults) - ("top_k one less" in self.faults)
        if "top_k inverted" in self.faults:
            return np.where(logits > np.sort(logits)[k - 1], -np.inf, logits)
        other = 0.0 if "top_k zeroes" in self.faults else -np.inf
        return np.where(logits < np.sort(logits)[-max(k, 1)], other, logits)

    def top_p(self, logits: np.ndarray, p: float) -> np.ndarray:
        if p == 1 and "top_p 1 is 0.7" in self.faults:
            p = 0.7
        if p == 1 or "top_p ignored" in self.faults:
            return logits
        order = np.argsort(-logits) if "top_p unsorted" not in self.faults else np.arange(self.V)
        sums = softmax(logits)[order].cumsum()
        n = int((sums < p).sum()) + ("top_p one more" in self.faults) - ("top_p one less" in self.faults)
        kept = order[: max(n + 1, 1)]
        if "top_p inverted" in self.faults:
            kept = order[-max(n + 1, 1) :]
        return np.where(np.isin(np.arange(self.V), kept), logits, 0.0 if "top_p zeroes" in self.faults else -np.inf)
