"""How fast a generation was, and how fast the machine's memory would let it be."""

from __future__ import annotations

import time

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gpt.device import on_cpu
from mlx_gpt.model.gpt import GPT


class Figures:
    """Counts tokens and seconds: a generation calls ``start``, then ``count`` for each step of the model.

    The first step is the prompt's; its time is how long the first token took to come.
    """

    def __init__(self, model: GPT, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.weight_bytes = weight_bytes(model)
        self.tokens = 0  # without those of the first step
        self.steps = 0
        self.peak_memory = mx.get_peak_memory()  # the most bytes that MLX has held at once, the weights included
        self._started = self._first = self._ended = 0.0

    def start(self) -> None:
        self._started = self._first = self._ended = time.perf_counter()

    def count(self, tokens: int) -> None:
        """The model has made another step, of so many tokens for all rows together."""
        self._ended = time.perf_counter()
        self.peak_memory = mx.get_peak_memory()
        if self.steps:
            self.tokens += tokens
        else:
            self._first = self._ended
        self.steps += 1

    @property
    def prompt_seconds(self) -> float:
        """Until the first token was there."""
        return self._first - self._started

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompts a second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second after the first, of all rows together."""
        return self.tokens / (self._ended - self._first) if self.tokens else 0.0

    def memory_share(self, memory_speed: float) -> float:
        """How much of the memory's speed (bytes/s) went into reading the weights, once for each step, 0 to 1."""
        seconds = self._ended - self._first
        return (self.steps - 1) * self.weight_bytes / seconds / memory_speed if self.tokens else 0.0

    def summary(self, memory_speed: float) -> str:
        """All of it in a line."""
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
        """The same by name: tokens/s, bytes, seconds."""
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
    """Bytes of the weights that every step reads: all but the embeddings of which it takes only a row."""
    rows_only = ("wpe.",) if model.config.tie_word_embeddings else ("wpe.", "wte.")
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(weight.nbytes for name, weight in weights.items() if not name.startswith(rows_only))


def memory_speed(rows: int = 16384) -> float:
    """Bytes a second at which a product of a matrix with one vector reads the matrix here: what decoding is bound by.

    Measured for a fifth of a second with all cores on so many rows of 4 KiB, 64 MiB if not given: more than most
    caches hold. A GPU, which takes longer to be asked than to multiply, is asked for several products at once.
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
