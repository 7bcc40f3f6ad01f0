"""Healthy samplers as people write them, each with a trained model and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .plain_sampler import PlainSampler, softmax
from .planted import Base, Given


def sampled(make: Callable[[Base], Any], *settings: str, **given: Any) -> Given:
    """A trained model with a sampler of one's own and nothing else."""
    base = Base(1, 4, True)
    its = {"vocab_size": base.config.vocab_size, "n_positions": base.config.n_positions}
    return {"forward": base.forward, "sample": make(base), "sample_settings": {*settings}, **its, **given}


def drawn_by(choose: Callable[[np.ndarray, Any], int], whole: bool = False) -> Callable[[Base], Any]:
    """Return a sampler that crops the text to the context and chooses from the last logits."""

    def make(base: Base) -> Any:
        rng = np.random.default_rng(0)

        def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
            text = list(ids)
            for _ in range(n):
                text.append(int(choose(base.forward([text[-48:]])[0, -1].astype(np.float64), rng, **settings)))
            return text if whole else text[len(ids) :]

        return sample

    return make


def by_inverse(logits: np.ndarray, rng: Any, temperature: float = 1.0) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(np.searchsorted(softmax(logits / temperature).cumsum(), rng.random()).clip(0, len(logits) - 1))


def by_gumbel(logits: np.ndarray, rng: Any, top_k: int = 0) -> int:
    lowest = np.sort(logits)[-top_k] if top_k else -np.inf
    return int((np.where(logits >= lowest, logits, -np.inf) + rng.gumbel(size=len(logits))).argmax())


def by_nucleus(logits: np.ndarray, rng: Any, temperature: float = 1.0, top_p: float = 1.0) -> int:
    """As transformers: the first token that passes p is kept."""
    p = softmax(logits / max(temperature, 1e-6))
    order = np.argsort(-p)
    kept = order[: 1 + int((p[order].cumsum() < top_p).sum())]
    return int(rng.choice(kept, p=p[kept] / p[kept].sum()))


def by_torch(logits: np.ndarray, rng: Any, temperature: float = 1.0, top_k: int | None = None) -> int:
    """As nanoGPT."""
    import torch

    row = torch.from_numpy(logits)[None] / max(temperature, 1e-8)
    if top_k:
        v, _ = torch.topk(row, min(top_k, row.size(-1)))
        row[row < v[:, [-1]]] = -float("inf")
    return int(torch.multinomial(torch.softmax(row, dim=-1), 1))


def ends(base: Base) -> Any:
    def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
        new = base.sampler()(ids, n, **settings)
        return new[: new.index(5) + 1] if 5 in new else new

    return sample


def plain_sampler(fault: str = "") -> Callable[[Base], PlainSampler]:
    return lambda base: base.sampler(fault)


SAMPLERS = {
    "sampler: returns the prompt": partial(sampled, plain_sampler("returns the prompt")),
    "sampler: seeded": partial(sampled, plain_sampler("seeded"), "temperature", "top_k"),
    "sampler: returns an array": partial(sampled, plain_sampler("returns an array"), "top_p"),
    "sampler: no settings": partial(sampled, drawn_by(by_inverse)),
    "sampler: inverse, temperature": partial(sampled, drawn_by(by_inverse), "temperature"),
    "sampler: Gumbel, top-k only": partial(sampled, drawn_by(by_gumbel), "top_k"),
    "sampler: nucleus": partial(sampled, drawn_by(by_nucleus, whole=True), "temperature", "top_p"),
    "sampler: nanoGPT's": partial(sampled, drawn_by(by_torch, whole=True), "temperature", "top_k"),
    "sampler: ends": partial(sampled, ends, "temperature", "top_k", "top_p", end_of_text=5),
}
