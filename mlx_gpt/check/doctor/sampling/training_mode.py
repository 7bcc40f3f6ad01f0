"""A sampler that draws from the model in training mode, with dropout."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found
from mlx_gpt.check.doctor.probes import EQUAL, training_noise
from mlx_gpt.check.doctor.sampling.draws import Draws, count, log_softmax
from mlx_gpt.check.doctor.sampling.evidence import Evidence
from mlx_gpt.check.doctor.sampling.explain import DECIDED, log_likelihood
from mlx_gpt.check.doctor.sampling.findings import drawing_fault
from mlx_gpt.check.doctor.sampling.fit import SURE, UNSURE, misfit
from mlx_gpt.check.doctor.sampling.rules import Base

PASSES = 32  # of the model with other dropout, whose probabilities are averaged


def of_training_mode(case: Case, drawn: Evidence, best: float) -> Found:
    """Return the finding if draws follow the mean probabilities of the model with dropout.

    They must be e^20 times as probable as in evaluation mode, not less probable than by the ``best`` other explanation,
    whose gain in nats is given, and fit at each temperature: p-value above 1e-3. Dropout makes draws at a low
    temperature like those of a higher one.
    """
    if not case.has("forward_training") or case.once(training_noise).relative <= EQUAL:
        return None
    gain = 0.0
    for temperature, draws in drawn:
        rule, others = Base().rule(temperature), with_dropout(case, temperature, draws)
        gain += log_likelihood(others, rule) - log_likelihood(draws, rule)
        if misfit(case, others, rule)[0] < UNSURE:
            return None
    if gain < max(SURE, best - DECIDED):
        return None
    every = [call for _, draws in drawn for call in draws]
    why = f"{count(every)} draws are predicted by the model in training mode, {gain:.3g} nats better than in evaluation"
    remedy = (
        "generate in evaluation mode, without dropout: model.eval(); if it is, compare the logits that the sampler "
    )
    fields = drawing_fault("sampler-not-the-model", why, gain, every, "below 20 nats")
    return fields | {"remedy": remedy + "draws from with forward's"}


def with_dropout(case: Case, temperature: float, calls: list[Draws]) -> list[Draws]:
    """Return draws with logits of which the softmax at a temperature is the mean of many passes with dropout."""
    alike: dict[tuple[int, int], list[Draws]] = defaultdict(list)
    for call in calls:
        alike[call.n_prompt, len(call.text)].append(call)
    changed = []
    for group in alike.values():
        texts, start = np.stack([call.text for call in group])[:, :-1], group[0].n_prompt - 1
        passes = (case.logits(texts, "forward_training")[:, start:] / temperature for _ in range(PASSES))
        mean = np.mean([np.exp(log_softmax(logits)) for logits in passes], axis=0)
        logits = temperature * np.log(np.maximum(mean, 1e-30))
        changed += [replace(call, logits=rows) for call, rows in zip(group, logits, strict=True)]
    return changed
