"""Planted faults of samplers, their settings and caches, as people write them, drawn by NumPy, MLX and torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .plain_cache import PlainCache
from .plain_sampler import PlainSampler
from .planted import Base, Given, Planted

Sample = Callable[..., Any]


def planted(code: str, fault: str, draw: str = "numpy", **where: Any) -> Planted:
    """Return a fault of ``PlainSampler``."""

    def plant(base: Base) -> Given:
        return base.arguments(sample=sampler(base, fault, draw), sample_many=None, cached=None)

    return Planted(code, plant, **where)


def sampler(base: Base, fault: str = "", draw: str = "numpy", forward: Any = None) -> PlainSampler:
    made = base.sampler(fault, forward)
    made.draw = draw
    importlib.import_module({"mlx": "mlx.core"}.get(draw, draw))  # not in the first call, which is timed
    return made


def plant_padding(side: str, base: Base) -> Given:
    """Return a ``sample_many`` that pads with id 0 and does not mask it."""

    def sample_many(prompts: list[list[int]], n: int, temperature: float = 1.0, **chosen: float) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = [
            [*pad, *prompt] if side == "left" else [*prompt, *pad] for pad, prompt in zip(pads, prompts, strict=True)
        ]
        choose = base.sampler()
        new = [choose(row, n, temperature, **chosen) for row in rows]  # type: ignore[arg-type]
        return [list(ids) for ids in new]

    return base.arguments(sample_many=sample_many, cached=None)


def in_training_mode(base: Base) -> Given:
    """Return a sampler that does not switch the model to evaluation mode."""
    given = base.arguments(cached=None, sample_many=None)
    return {**given, "sample": sampler(base, forward=given["forward_training"])}


def plant_cache(fault: str, base: Base) -> Given:
    """Return cached logits of a cache with a fault."""
    forward = base.forward

    def cached(ids: list[int], n_prompt: int) -> np.ndarray:
        first = forward([ids[:n_prompt]])[0]
        later = []
        for t in range(n_prompt, len(ids)):
            start = n_prompt if fault == "positions start again" else 0
            kept = ids[start : t + 1]
            if fault == "prompt's last token lost":
                kept = [*ids[: n_prompt - 1], *ids[n_prompt : t + 1]]
            if fault == "values overwritten" and t > n_prompt:
                kept = [*ids[:n_prompt], ids[t - 1], *ids[n_prompt + 1 : t + 1]]
            later.append(forward([kept])[0, -1:])
        return np.concatenate([first, *later])

    return base.arguments(cached=cached, sample_many=None, sample=None)


def plant_padded_vocabulary(base: Base) -> Given:
    """Return a model of more ids than the vocabulary has, whose forward pass alone cuts them off."""
    V = base.config.vocab_size
    padded = np.random.default_rng(base.seed)

    def longer(ids: Any) -> np.ndarray:
        logits = base.forward(np.minimum(ids, V - 1))
        more = padded.normal(logits.mean(), logits.std(), (*logits.shape[:2], max(3, V // 20)))
        return np.concatenate([logits, more.astype(np.float32)], axis=-1)

    draws = sampler(base, forward=longer)
    draws.V = V + max(3, V // 20)
    return base.arguments(sample=draws, sample_many=None, cached=None)


class CachedSampler(PlainSampler):
    """A sampler that reads by a key-value cache: the prompt at once, then one token at a time."""

    cached: Callable[[list[int], int], np.ndarray]

    def logits(self, text: list[int], new: list[int], n_prompt: int) -> np.ndarray:
        n = n_prompt if len(text) <= self.P else self.P
        return self.cached([int(i) for i in text[-self.P :]], n)[-1]


def generates_by_a_cache(fault: str) -> Callable[[Base], Given]:
    """Return a sampler that reads by a cache with a fault."""

    def plant(base: Base) -> Given:
        given = base.arguments(sample_many=None)
        cached = PlainCache(given["parameters"](), base.config, fault)
        reads = CachedSampler(base.forward, base.config.vocab_size, base.config.n_positions, seed=base.seed)
        reads.cached = cached
        return {**given, "cached": cached, "sample": reads}

    return plant


FAULTS: dict[str, Planted] = {
    "generates by a faulty cache": Planted("cache-mismatch", generates_by_a_cache("position one behind"), sizes=(0, 1)),
    "argmax always": planted("sampler-too-narrow", "sampler-too-narrow"),
    "softmax twice": planted("probabilities-as-logits", "probabilities-as-logits"),
    "softmax twice, temperature inside": planted("probabilities-as-logits", "softmax twice"),
    "mx.random.categorical of probabilities": planted("probabilities-as-logits", "softmax twice", "mlx"),
    "torch.multinomial of a second softmax": planted(
        "probabilities-as-logits", "softmax twice", "torch", libraries=("torch",)
    ),
    "logits one position too early": planted("sampler-not-the-model", "previous position"),
    "half the temperature": planted("sampler-not-the-model", "half the temperature"),
    "new ids never fed back": planted("sampler-not-the-model", "prompt alone"),
    "dropout left on": Planted("sampler-not-the-model", in_training_mode, states=(True,), sizes=(1,)),
    "last 8 tokens alone": planted("sampler-not-the-model", "last 8 tokens", sizes=(1, 2), states=(True,)),
    "prompt dropped": planted("prompt-ignored", "prompt-ignored"),
    "last token only": planted("prompt-ignored", "last token only"),
    "prompt's last token only": planted("prompt-ignored", "prompt's last token"),
    "one noise for a text": planted("draws-correlated", "same noise"),
    "one random number for a text": planted("draws-correlated", "same random number"),
    "one key for each token": planted("draws-correlated", "same key", "mlx"),
    "torch seeded at each token": planted("draws-correlated", "same key", "torch", libraries=("torch",)),
    "ids plus one": planted("id-outside-vocabulary", "ids plus one"),
    "padded logits sampled": Planted("id-outside-vocabulary", plant_padded_vocabulary),
    "returns another prompt": planted("prompt-changed", "returns another prompt"),
    "appends to the prompt": planted("prompt-changed", "appends to the prompt"),
    **{f"{setting} ignored": planted("setting-ignored", f"{setting} ignored") for setting in ("temperature", "top_k")},
    **{f"{setting} ignored": planted("setting-ignored", f"{setting} ignored") for setting in ("top_p", "penalty")},
    **{
        f"{setting} inverted": planted("setting-inverted", f"{setting} inverted")
        for setting in ("temperature", "top_k", "top_p")
    },
    "top_k keeps one more": planted("setting-wrong", "top_k one more"),
    "top_k keeps one less": planted("setting-wrong", "top_k one less"),
    "top_k 0 keeps one": planted("setting-wrong", "top_k 0 keeps one"),
    "top_k sets other logits to 0": planted("setting-wrong", "top_k zeroes"),
    "top_k draws each kept id alike": planted("setting-wrong", "top_k uniform"),
    "top_p sets other logits to 0": planted("setting-wrong", "top_p zeroes"),
    "top_p keeps one more": planted("setting-wrong", "top_p one more"),
    "top_p keeps one less": planted("setting-wrong", "top_p one less"),
    "top_p 1 drops ids": planted("setting-wrong", "top_p 1 is 0.7"),
    "penalty divides negative logits": planted("penalty-rewards-repetition", "penalty-rewards-repetition"),
    "penalty for each occurrence": planted("penalty-compounds", "penalty-compounds"),
    "padded on the left": Planted("padding-differs", partial(plant_padding, "left"), states=(True,)),
    "padded on the right": Planted("padding-differs", partial(plant_padding, "right"), states=(True,)),
    "IndexError beyond the context": planted("beyond-context", "beyond-context"),
    "first tokens beyond the context": planted("beyond-context", "positions stay"),
    "returns the last of its text": planted("beyond-context", "returns the last of its text"),
    "restarted at the context": planted("beyond-context", "restarts", states=(True,)),  # else all windows predict alike
    "cache: positions start again": Planted("cache-mismatch", partial(plant_cache, "positions start again")),
    "cache: token lost": Planted("cache-mismatch", partial(plant_cache, "prompt's last token lost")),
    "cache: token overwritten": Planted("cache-mismatch", partial(plant_cache, "values overwritten")),
}
