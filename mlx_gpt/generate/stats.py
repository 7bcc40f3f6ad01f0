"""The speed of a generation, and the speed of the machine's memory, which bounds it."""

from __future__ import annotations

import time

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gpt.device import on_cpu
from mlx_gpt.model.gpt import GPT


class GenerationStats:
    """Counts tokens and seconds: call ``start``, then ``count`` after each step of the model.

    The first step is the prompt's; its time is the time to the first token.
    """

    def __init__(self, model: GPT, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.weight_bytes = weight_bytes(model)
        self.tokens = 0  # without those of the first step
        self.steps = 0
        self.peak_memory = mx.get_peak_memory()  # bytes held by MLX, weights included
        self._started = self._first = self._ended = 0.0

    def start(self) -> None:
        self._started = self._first = self._ended = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Record a step that made ``tokens`` tokens in all rows together."""
        self._ended = time.perf_counter()
        self.peak_memory = mx.get_peak_memory()
        if self.steps:
            self.tokens += tokens
        else:
            self._first = self._ended
        self.steps += 1

    @property
    def prompt_seconds(self) -> float:
        """Seconds until the first token."""
        return self._first - self._started

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def speed(self) -> float:
        """Tokens per second after the first, of all rows together."""
        return self.tokens / (self._ended - self._first) if self.tokens else 0.0

    def memory_share(self, memory_speed: float) -> float:
        """The share of the memory's speed (bytes/s) used for reading the weights, once per step; 0 to 1."""
        seconds = self._ended - self._first
        return (self.steps - 1) * self.weight_bytes / seconds / memory_speed if self.tokens else 0.0

    def summary(self, memory_speed: float) -> str:
        """Return all figures in one line."""
        parts = []
        if self.steps:
            parts.append(f"prompt of {self.prompt_tokens}: {self.prompt_speed:.1f} tokens/s")
        if self.tokens:
            share = (
                f"{self.memory_share(memory_speed):.0%} of this machine's memory speed ({memory_speed / 1e9:.1f} GB/s)"
            )
            parts.append(f"text: {self.speed:.1f} tokens/s, {share}")
        return "; ".join([*parts, f"peak memory {self.peak_memory / 2**20:,.0f} MiB"])

    def as_dict(self, memory_speed: float) -> dict[str, float]:
        """Return all figures by name, in tokens/s, bytes and seconds."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": self.prompt_seconds,
            "prompt_tokens_per_second": self.prompt_speed,
            "tokens_per_second": self.speed,
            "peak_memory_bytes": self.peak_memory,
            "memory_bytes_per_second": memory_speed,
            "share_of_memory_speed": self.memory_share(memory_speed),
        }


def weight_bytes(model: GPT) -> int:
    """Return the bytes of the weights that every step reads: all except embeddings of which it takes single rows."""
    rows_only = ("wpe.",) if model.config.tie_word_embeddings else ("wpe.", "wte.")
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(weight.nbytes for name, weight in weights.items() if not name.startswith(rows_only))


def memory_speed(rows: int = 16384) -> float:
    """Measure the bytes per second at which a matrix-vector product reads its matrix, which bounds decoding.

    Takes a fifth of a second. The matrix has ``rows`` rows of 4 KiB, 64 MiB by default: more than most caches hold. A
    GPU gets several products at once, since launching one takes longer than computing it.
    """
    matrix, x = mx.zeros((rows, 1024)), mx.ones((1, 1024))
    at_once = 1 if on_cpu() else 16
    mx.eval(matrix, x, x @ matrix.T)
    times: list[float] = []
    end = time.perf_counter() + 0.2
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        mx.eval([x @ matrix.T for _ in range(at_once)])
        times.append((time.perf_counter() - started) / at_once)
    return matrix.nbytes / min(times)
