"""Beam search: at each step keep the most probable few of all continuations by one token.

Sutskever et al. 2014, section 3.2; the details are those of transformers (``generation/utils.py``, ``_beam_search``).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.history import History
from mlx_gpt.generate.sampler import Sampler


class Beam(NamedTuple):
    """A text: its ids after the prompt, the end token included, and the sum of their log-probabilities in nats."""

    ids: list[int]
    logp: float

    def score(self, length_penalty: float) -> float:
        """Return the sum divided by a power of the length; with 1 it is the mean."""
        return self.logp / len(self.ids) ** length_penalty


def beam_search(decoder: Decoder, sampler: Sampler, prompt: mx.array, logits: mx.array, limit: int) -> list[Beam]:
    """Return the best texts of at most ``limit`` tokens, best first; none if the rules forbid every token.

    The decoder has read the prompt, (1, L), and ``logits`` (1, V) follow it. The search ends when no open text has a
    better score than the worst of ``beams`` finished ones. Where a context is full, the last half of each text is read
    again.
    """
    P = decoder.model.config.n_positions
    n, penalty = sampler.settings[0].beams, sampler.settings[0].length_penalty
    beams, finished = [Beam([], 0.0)], []
    while True:
        candidates = continuations(beams, _logp(logits, sampler, prompt, beams, limit), 2 * n)
        is_finished = [beam.ids[-1] in sampler.end_ids or len(beam.ids) == limit for _, beam in candidates]
        finished += [beam for (_, beam), over in zip(candidates[:n], is_finished, strict=False) if over]
        finished = sorted(finished, key=lambda beam: -beam.score(penalty))[:n]
        open_beams = [candidate for candidate, over in zip(candidates, is_finished, strict=True) if not over][:n]
        if not open_beams or (len(finished) == n and open_beams[0][1].score(penalty) <= finished[-1].score(penalty)):
            return finished
        parents, beams = [parent for parent, _ in open_beams], [beam for _, beam in open_beams]
        if decoder.offset < P:
            decoder.keep(parents)
            logits = decoder.step(mx.array([beam.ids[-1:] for beam in beams]))[:, -1]
        else:
            texts = mx.concatenate([mx.repeat(prompt, len(beams), axis=0), mx.array([b.ids for b in beams])], axis=1)
            logits = decoder.prefill(texts[:, -(P // 2) :])


def continuations(beams: list[Beam], logp: np.ndarray, n: int) -> list[tuple[int, Beam]]:
    """Return the n most probable continuations by one token with the index of their parent; ``logp`` (beams, V)."""
    sums = logp + np.array([[beam.logp] for beam in beams])
    best = np.argpartition(-sums, min(n, sums.size) - 1, axis=None)[:n]
    best = best[np.argsort(-sums.flat[best], kind="stable")]
    parents, ids = np.unravel_index(best, sums.shape)
    return [
        (int(parent), Beam([*beams[parent].ids, int(token_id)], float(sums[parent, token_id])))
        for parent, token_id in zip(parents, ids, strict=True)
        if sums[parent, token_id] > -np.inf
    ]


def _logp(logits: mx.array, sampler: Sampler, prompt: mx.array, beams: list[Beam], limit: int) -> np.ndarray:
    """Return log-probabilities of the next id after each beam, (beams, V), after the rules: they need not sum to 1."""
    history = History(mx.repeat(prompt, len(beams), axis=0), [limit] * len(beams))
    if beams[0].ids:
        history = history.then(mx.array([beam.ids for beam in beams]))
    logp = nn.log_softmax(logits.astype(mx.float32))
    return np.array(sampler.apply_rules(logp, sampler.inputs(history), history)).astype(np.float64)
