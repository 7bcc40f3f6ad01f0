"""Draws of a sampler that reads by the key-value cache, where that has a fault of its own."""

from __future__ import annotations

from dataclasses import replace

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.forward.cache import LIMIT, cached_logits
from mlx_gpt.check.doctor.probes import between, largest, steady_noise
from mlx_gpt.check.doctor.sampling.draws import Draws
from mlx_gpt.check.doctor.sampling.evidence import Evidence
from mlx_gpt.check.doctor.sampling.explain import log_likelihood
from mlx_gpt.check.doctor.sampling.fit import SURE, fits
from mlx_gpt.check.doctor.sampling.rules import Base

MOST = 400  # texts at each temperature


def follows_cache(case: Case, drawn: Evidence) -> bool:
    """Return True if draws follow the logits of a faulty cache, and forward's do not make them e^20 times as probable.

    The sampler may then be right, and its texts a consequence of the cache.
    """
    if "cache-mismatch" not in case.found:
        return False
    gain, differs = 0.0, False
    for temperature, calls in drawn:
        rule, texts = Base().rule(temperature), calls[:MOST]
        try:
            by_cache = [with_cached_logits(case, call) for call in texts]
        except CallFailed:
            return False
        if not fits(case, by_cache, rule):
            return False
        differs |= any(
            largest(between(own.logits, cached.logits)) > LIMIT * case.once(steady_noise).scale
            for own, cached in zip(texts, by_cache, strict=True)
        )
        gain += log_likelihood(by_cache, rule) - log_likelihood(texts, rule)
    return differs and gain > -SURE


def with_cached_logits(case: Case, call: Draws) -> Draws:
    """Return draws with the logits of ``cached``, which reads the prompt at once."""
    logits = cached_logits(case, call.text[:-1], call.n_prompt)
    return replace(call, logits=logits[call.n_prompt - 1 :])
