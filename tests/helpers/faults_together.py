"""Two and three faults in one model; all are to be named, in the order in which to repair them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_gpt.check.doctor.codes import ORDER

from .planted import Base, Given
from .planted_data import not_shifted, read_twice
from .planted_forward import PlainCache


@dataclass(frozen=True)
class Together:
    named: tuple[str, ...]
    plant: Callable[[Base], Given]

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(sorted(self.named, key=ORDER.__getitem__))


def in_model(base: Base, *faults: str, **given: Any) -> Given:
    return base.with_faults(*faults).arguments(**given)


def with_cache(base: Base, fault: str, **given: Any) -> Given:
    weights = base.arguments()["parameters"]
    return base.arguments(cached=lambda ids, n: PlainCache(weights(), base.config, fault)(ids, n), **given)


def fed(base: Base, draw: Callable[..., Any], **given: Any) -> Given:
    return base.arguments(batches=lambda: draw(base, 0), **given)


def one_off(base: Base) -> Callable[[Any], str]:
    return lambda ids: base.decode([(int(i) + 1) % len(base.vocabulary) for i in ids])


def prompt_ignored(sampler: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ids, n, **settings: sampler([0], n, **settings)


TOGETHER = {
    "no mask, dropout left on": Together(
        ("future-leak", "not-deterministic"),
        lambda base: base.with_faults("no-mask", "dropout-left-on", dropout=0.1).arguments(),
    ),
    "no mask, the batch mixed": Together(
        ("future-leak", "batch-leak"), lambda base: in_model(base, "mask-shifted", "batch-norm")
    ),
    "no mask, top-k inverted": Together(
        ("future-leak", "setting-inverted"),
        lambda base: base.with_faults("no-mask").arguments(
            sample=base.with_faults("no-mask").sampler("top_k inverted")
        ),
    ),
    "no mask, targets not shifted": Together(
        ("future-leak", "targets-not-shifted"),
        lambda base: fed(base.with_faults("no-mask"), not_shifted),
    ),
    "no positions, top-k inverted": Together(
        ("position-blind", "setting-inverted"),
        lambda base: base.with_faults("position-blind").arguments(
            sample=base.with_faults("position-blind").sampler("top_k inverted")
        ),
    ),
    "noise, cache": Together(
        ("not-deterministic", "targets-not-shifted"), lambda base: fed(base.with_faults("noise"), not_shifted)
    ),
    "cache, greedy always": Together(
        ("cache-mismatch", "sampler-too-narrow"),
        lambda base: with_cache(base, "position one behind", sample=base.sampler("sampler-too-narrow")),
    ),
    "targets, decode": Together(
        ("targets-not-shifted", "tokenizer-not-invertible"),
        lambda base: fed(base, not_shifted, decode=one_off(base)),
    ),
    "penalty, prompt ignored": Together(
        ("prompt-ignored", "penalty-rewards-repetition"),
        lambda base: base.arguments(sample=prompt_ignored(base.sampler("penalty-rewards-repetition"))),
    ),
    "read twice, decode": Together(
        ("corpus-repeats", "tokenizer-not-invertible"), lambda base: {**read_twice(base), "decode": one_off(base)}
    ),
    "cache, targets, decode": Together(
        ("cache-mismatch", "targets-not-shifted", "tokenizer-not-invertible"),
        lambda base: with_cache(
            base, "keeps eight tokens", batches=lambda: not_shifted(base, 0), decode=one_off(base)
        ),
    ),
    "no mask, targets, top-k": Together(
        ("future-leak", "targets-not-shifted", "setting-ignored"),
        lambda base: fed(
            base.with_faults("zero-mask"), not_shifted, sample=base.with_faults("zero-mask").sampler("top_k ignored")
        ),
    ),
    "noise, batch, cache of another": Together(
        ("not-deterministic", "batch-leak", "tokenizer-not-invertible"),
        lambda base: in_model(base, "noise", "batch-norm", decode=one_off(base)),
    ),
}  # fmt: skip
