"""Choose prompts and temperatures at which faults show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.sampling.contexts import windows
from mlx_gpt.check.doctor.sampling.crop import tokens_read
from mlx_gpt.check.doctor.sampling.draws import Draws, accepted, log_softmax, new_ids, settings_off, with_logits
from mlx_gpt.check.doctor.sampling.explain import divergences
from mlx_gpt.check.doctor.sampling.texts import logits_after, shapes

GRID = 2.0 ** np.arange(-6, 8)  # temperatures to choose from; lower ones are greedy in some samplers
TELLS = 0.1  # nats per draw, with which a few hundred draws decide
USUAL = (0.5, 2.0)  # temperatures between which to choose for a sampler that refuses others


def temperatures(case: Case) -> np.ndarray:
    """Return the temperatures of ``GRID`` that ``sample`` accepts, and at which rounding is far below chance."""
    if "temperature" not in accepted(case):
        return np.ones(1)
    grid = GRID[5 * shapes(case).rounding < GRID]
    try:
        for temperature in (grid[0], grid[-1]):
            new_ids(case, case.once(short_prompts)[0], 1, **settings_off(case, temperature=float(temperature)))
    except CallFailed:
        grid = grid[(grid >= USUAL[0]) & (grid <= USUAL[1])]
    return grid


def short_prompts(case: Case) -> list[list[int]]:
    """Return 256 random prompts of up to a quarter of the context; longer if only the last tokens are read."""
    length, read = max(1, min(6, case.n_positions // 4)), case.once(tokens_read)
    if read:
        length = max(length, min(read + 4, case.n_positions - 3))
    return case.ids(256, length).tolist()


def n_texts(case: Case) -> int:
    """Return a number of texts for which computing with the logits is fast."""
    return int(np.clip(100_000 // case.vocab_size, 4, 32))


def probe_draws(case: Case) -> list[Draws]:
    """Return logits after some prompts, as draws of one id."""
    return after_prompts(case, case.once(short_prompts)[: case.once(n_texts)])


def after_prompts(case: Case, prompts: list[list[int]]) -> list[Draws]:
    return with_logits(case, [np.array([*prompt, 0]) for prompt in prompts], len(prompts[0]))


def probe_logits(case: Case) -> np.ndarray:
    return np.concatenate([call.logits for call in case.once(probe_draws)])


def entropy(logprobs: np.ndarray) -> float:
    """Return the mean entropy in nats."""
    return float(-(np.exp(logprobs) * np.maximum(logprobs, -1e9)).sum(axis=1).mean())


def entropies(case: Case) -> np.ndarray:
    """Return the mean entropy of the predictions after some prompts at each of the temperatures, in nats."""
    return np.array([entropy(log_softmax(case.once(probe_logits) / t)) for t in case.once(temperatures)])


def telling_temperatures(case: Case) -> list[float]:
    """Return one to three temperatures at which the predictions are neither almost certain nor almost uniform."""
    grid, nats = case.once(temperatures), case.once(entropies)
    between = (nats > min(1.0, 0.3 * np.log(case.vocab_size))) & (nats < 0.98 * np.log(case.vocab_size))
    if not between.any():
        between = np.arange(len(grid)) == np.abs(nats - 0.6 * np.log(case.vocab_size)).argmin()
    return sorted({*np.quantile(grid[between], (0, 0.5, 1), method="nearest").tolist()})


@dataclass(frozen=True)
class Sharp:
    """The temperature and prompts whose draws tell most about what is read.

    ``nats``: per draw, for the text that is the hardest to tell apart.
    """

    temperature: float
    prompts: list[list[int]]
    nats: float


def sharp(case: Case) -> Sharp:
    """Return the temperature and the eighth of the prompts at which draws tell most.

    Measured is the mean divergence of the right prediction from those at other temperatures and after other texts, in
    nats per draw. Each counts up to ``TELLS``, so that all differ somewhat rather than one of them much.
    """
    prompts = case.once(short_prompts)[: 4 * case.once(n_texts)]
    whole = logits_after(case, prompts)
    texts = [[read(prompt, []) for prompt in prompts] for read in windows(case).values()]
    contexts = [logits_after(case, text) for text in texts if all(text) and text != prompts]
    best, highest = Sharp(1.0, prompts, 0.0), 0.0
    for temperature, nats in zip(case.once(temperatures).tolist(), case.once(entropies), strict=True):
        p = log_softmax(whole / temperature)
        others = [log_softmax(other / temperature) for other in contexts]
        others += [log_softmax(whole / t) for t in (1.0, temperature / 2, 2 * temperature) if t != temperature]
        differ = np.stack([np.minimum(divergences(p, other), 0.5) for other in others])
        most = np.argsort(-differ.mean(axis=0))[: max(4, len(prompts) // 8)]
        value = float(np.minimum(differ[:, most].mean(axis=1), TELLS).mean())
        if nats > 0.1 and value > highest:
            highest = value
            best = Sharp(temperature, [prompts[i] for i in most], float(differ[:, most].mean(axis=1).min()))
    return best


def sharp_temperature(case: Case) -> float:
    return case.once(sharp).temperature


def flat_temperature(case: Case) -> float:
    """Return the inverse of the sharp temperature: there a sampler that multiplies by the temperature is sharp."""
    sharp, grid = case.once(sharp_temperature), case.once(temperatures)
    return float(np.clip(1 / sharp, grid[0], grid[-1]))
