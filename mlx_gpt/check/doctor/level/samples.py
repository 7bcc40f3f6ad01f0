"""Texts that ``sample`` draws with its own default settings, and their mean -log p under the model."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.data.evidence import flat_ids
from mlx_gpt.check.doctor.level.loss import SHARE, end_of_text
from mlx_gpt.check.doctor.sampling.draws import Draws, chosen, draw, log_softmax

DRAWS = 400  # tokens to draw
LONGEST = 200  # new ids of one sample
# A difference is a fault only beyond both:
STANDARD_ERRORS = 5.0  # exceeded by chance with probability 3e-7
NATS = 0.1  # per token


def prompts(case: Case) -> list[list[int]]:
    """Return 64 short pieces of the validation ids, else of the training ids, else random ids."""
    length = max(1, min(16, case.n_positions // 4))
    for name in ("val_ids", "train_ids"):
        if case.has(name) and len(ids := flat_ids(case, name)) > length and inside(case, ids):
            starts = np.flatnonzero(ids[:-length] == case.once(end_of_text)) if name == "val_ids" else np.zeros(0)
            starts = case.rng.choice(starts if len(starts) else len(ids) - length, 64)
            return [[int(i) for i in ids[start : start + length]] for start in starts]
    return case.ids(64, length).tolist()


def inside(case: Case, ids: np.ndarray) -> bool:
    return bool(int(ids.min()) >= 0 and int(ids.max()) < case.vocab_size)


def samples(case: Case) -> list[Draws]:
    """Return texts of ``sample`` with its default settings; four times as many if the first do not decide."""
    texts = drawn(case, DRAWS)
    first = surprise_of(texts)
    if not first.too_high and first.excess > max(NATS / 2, 2 * first.error):
        texts += drawn(case, 3 * DRAWS)
    return texts


def drawn(case: Case, wanted: int) -> list[Draws]:
    """Call ``sample`` with its default settings until ``wanted`` ids are drawn or time is over, short texts first."""
    texts: list[Draws] = []
    end, n, total = time.monotonic() + SHARE * case.seconds_left(), 8, 0
    for prompt in case.once(prompts):
        started = time.monotonic()
        text = draw(case, prompt, n)
        texts += [text] if len(text.new) else []  # a text may end at once
        total += len(text.new)
        now = time.monotonic()
        if total >= wanted or now > end:
            break
        n = min(LONGEST, 4 * n, max(1, int(len(text.new) * (end - now) / max(now - started, 1e-6))))
    if not texts:
        raise NotApplicable("a sampler that returns ids")
    return texts


@dataclass(frozen=True)
class Surprise:
    """How improbable sampled tokens are under the model, in nats per token."""

    mean: float  # of -log p of each token
    entropy: float  # the expectation of ``mean`` if the tokens are drawn from the model
    error: float  # the standard error of their difference then
    n: int  # tokens

    @property
    def excess(self) -> float:
        return self.mean - self.entropy

    @property
    def margin(self) -> float:
        return max(NATS, 0.05 * self.entropy, STANDARD_ERRORS * self.error)

    @property
    def too_high(self) -> bool:
        return self.excess > self.margin


def surprise(case: Case) -> Surprise:
    return surprise_of(case.once(samples))


def surprise_of(calls: list[Draws]) -> Surprise:
    """Return the mean -log p of sampled tokens, and its expectation: the model's mean entropy at the same places.

    The difference of both is a martingale, so its standard error holds however the texts depend on earlier draws.
    """
    calls = [call for call in calls if np.isfinite(call.logits).all()]
    if not calls:
        raise NotApplicable("logits that are finite")
    logprobs = log_softmax(np.concatenate([call.logits for call in calls]))
    ids = np.concatenate([call.new for call in calls])
    p, own = np.exp(logprobs), -np.maximum(chosen(logprobs, ids), -50)
    surprises = -np.maximum(logprobs, -50)
    entropy = (p * surprises).sum(axis=1)
    variance = (p * np.square(surprises - entropy[:, None])).sum(axis=1)
    return Surprise(float(own.mean()), float(entropy.mean()), float(variance.sum() ** 0.5) / len(ids), len(ids))
