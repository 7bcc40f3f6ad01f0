"""Learning-rate schedules. A new one is a function and an entry in ``SCHEDULES``."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

import mlx.optimizers as optim

WSD_DECAY = 0.4  # share of the run in which wsd decays


def cosine(done: float, warmup: float) -> float:
    """Decay from 1 at the end of the warmup to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + cos(pi * min(1.0, (done - warmup) / (1 - warmup))))


def wsd(done: float, warmup: float) -> float:
    """Warmup, stable, decay: stay at 1 until the last 40 %, then decay linearly to 0 (Hu et al. 2024)."""
    return min(1.0, max(0.0, 1 - done) / WSD_DECAY)


SCHEDULES = {"cosine": cosine, "wsd": wsd}


class Schedule:
    """Scale every learning rate of an optimizer: linear warmup, then a decay to ``final`` times the peak.

    The learning rates are set as a function of the share of the run that is done (0 to 1), so that a run may last a
    number of steps or of minutes. ``extended`` is the share that was done when the run was extended, and the factor
    then: from there the factor rises to 1 over the share ``warmup`` of what was left, unless the schedule is lower.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        kind: str = "cosine",
        warmup: float = 0.02,
        final: float = 0.1,
        extended: Sequence[float] = (),
    ):
        self.decay, self.warmup, self.final, self.extended = SCHEDULES[kind], warmup, final, extended
        self.optimizers = getattr(optimizer, "optimizers", [optimizer])
        self.peaks = [float(one.learning_rate.item()) for one in self.optimizers]

    def factor(self, done: float) -> float:
        """Return the learning rate as a share of its peak."""
        planned = self.final + (1 - self.final) * self.decay(done, self.warmup)
        if done < self.warmup:
            planned = done / self.warmup
        if not (self.extended and self.warmup):
            return planned
        start, low = self.extended
        return min(planned, low + (1 - low) * (done - start) / (self.warmup * (1 - start)))

    def set(self, done: float) -> float:
        """Set the learning rates; return that of the last optimizer, which is AdamW."""
        factor = self.factor(done)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.learning_rate = peak * factor
        return self.peaks[-1] * factor
