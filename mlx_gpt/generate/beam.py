"""Beam search: always the most probable few of the texts begun, instead of one token for good at a time.

Sutskever et al. 2014, section 3.2; the details are those of transformers (``generation/utils.py``, ``_beam_search``).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.rng import row_keys
from mlx_gpt.generate.sampler import Said, Sampler


class Beam(NamedTuple):
    """A text: its ids after the prompt, that of the end included, and the sum of their log-probabilities, in nats."""

    ids: list[int]
    logp: float

    def score(self, length_penalty: float) -> float:
        """What texts are compared by: the sum, divided by a power of the length. 1 makes it the mean."""
        return self.logp / len(self.ids) ** length_penalty


def beam_search(decoder: Decoder, sampler: Sampler, prompt: mx.array, logits: mx.array, limit: int) -> list[Beam]:
    """The best texts of at most ``limit`` tokens, the best first; none where the rules forbid every token.

    The decoder has read the prompt, (1, L), and ``logits`` (1, V) are what the model says after it. It ends when the
    most probable text still open is, for its length, no more probable than each of as many that have ended.
    """
    n, penalty = sampler.settings.beams, sampler.settings.length_penalty
    beams, ended = [Beam([], 0.0)], []
    while True:
        candidates = continuations(beams, _logp(logits, sampler, prompt, beams, limit), 2 * n)
        is_over = [beam.ids[-1] == sampler.end_id or len(beam.ids) == limit for _, beam in candidates]
        ended += [beam for (_, beam), over in zip(candidates[:n], is_over, strict=False) if over]
        ended = sorted(ended, key=lambda beam: -beam.score(penalty))[:n]
        going_on = [candidate for candidate, over in zip(candidates, is_over, strict=True) if not over][:n]
        if not going_on or (len(ended) == n and going_on[0][1].score(penalty) <= ended[-1].score(penalty)):
            return ended
        parents, beams = [parent for parent, _ in going_on], [beam for _, beam in going_on]
        decoder.keep(parents)
        logits = decoder.step(mx.array([beam.ids[-1:] for beam in beams]))[:, -1]


def continuations(beams: list[Beam], logp: np.ndarray, n: int) -> list[tuple[int, Beam]]:
    """The n most probable continuations by a token, and which beam each continues; ``logp`` (beams, V)."""
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
    """Log-probabilities of the next id after each beam, (beams, V), as the rules leave them: they need not sum to 1."""
    B = len(beams)
    said = Said(mx.repeat(prompt, B, axis=0), mx.full((B,), limit))
    if beams[0].ids:
        said.add(mx.array([beam.ids for beam in beams]))
    logits = logits.astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(sampler.rule(logp, sampler.inputs(said, row_keys(0, B)), said)).astype(np.float64)
