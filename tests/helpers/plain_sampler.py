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
    fault: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

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
        if self.fault == "appends to the prompt":
            text = ids
        rng = np.random.default_rng(1) if self.fault == "seeded" else self.rng
        noise, u = rng.gumbel(size=self.V), rng.random()
        for _ in range(n):
            logits = self.logits(text, new, len(ids)).astype(np.float64)
            logits = self.penalize(logits, text, repetition_penalty)
            i = self.choose(logits, temperature, top_k, top_p, rng, noise, u)
            text.append(i)
            new.append(i)
        if self.fault == "returns another prompt":
            return [0, *text[1:]]
        if self.fault == "returns the prompt":
            return text
        return np.array(new) if self.fault == "returns an array" else new  # type: ignore[return-value]

    def logits(self, text: list[int], new: list[int], n_prompt: int) -> np.ndarray:
        read, place = [i % self.V for i in text], -1
        if self.fault == "prompt-ignored":
            read = [0, *new]
        if self.fault == "last token only":
            read = read[-1:]
        if self.fault == "beyond-context" and len(read) > self.P:
            raise IndexError("index out of range in self")
        if self.fault == "positions stay":
            read = read[: self.P]
        if self.fault == "previous position" and len(read) > 1:
            place = -2
        return self.forward(np.array([read[-self.P :]], np.int32))[0, place]

    def penalize(self, logits: np.ndarray, text: list[int], penalty: float) -> np.ndarray:
        ids, counts = np.unique([i % self.V for i in text], return_counts=True)
        if self.fault == "penalty ignored":
            return logits
        if self.fault == "penalty-compounds":
            penalty = penalty**counts
        values = logits[ids]
        down = np.where(values < 0, values * penalty, values / penalty)
        logits[ids] = values / penalty if self.fault == "penalty-rewards-repetition" else down
        return logits

    def choose(
        self, logits: np.ndarray, temperature: float, k: int, p: float, rng: Any, noise: np.ndarray, u: float
    ) -> int:
        fault = self.fault
        if temperature == 0 or fault == "sampler-too-narrow":
            return int(logits.argmax())
        if fault == "probabilities-as-logits":
            logits = softmax(logits)
        if fault == "half the temperature":
            temperature /= 2
        logits = logits / {"temperature ignored": 1, "temperature inverted": 1 / temperature}.get(fault, temperature)
        logits = self.top_p(self.top_k(logits, k), p)
        probabilities = softmax(logits)
        if fault == "same noise":
            return int((logits + noise).argmax())
        if fault == "same random number":
            return min(int((probabilities.cumsum() < u).sum()), self.V - 1)
        i = int(rng.choice(self.V, p=probabilities))
        return i + 1 if fault == "ids plus one" else i

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        fault = self.fault
        if fault == "top_k 0 keeps one":
            k = max(k, 1)
        if k == 0 or fault == "top_k ignored":
            return logits
        k = min(k, self.V) + {"top_k one more": 1, "top_k one less": -1}.get(fault, 0)
        if fault == "top_k inverted":
            return np.where(logits > np.sort(logits)[k - 1], -np.inf, logits)
        return np.where(logits < np.sort(logits)[-max(k, 1)], -np.inf, logits)

    def top_p(self, logits: np.ndarray, p: float) -> np.ndarray:
        if p == 1 or self.fault == "top_p ignored":
            return logits
        order = np.argsort(-logits)
        sums = softmax(logits)[order].cumsum()
        n = int((sums < p).sum()) + {"top_p one more": 1, "top_p one less": -1}.get(self.fault, 0)
        kept = order[: max(n + 1, 1)]
        if self.fault == "top_p inverted":
            kept = order[-max(n + 1, 1) :]
        return np.where(np.isin(np.arange(self.V), kept), logits, -np.inf)
