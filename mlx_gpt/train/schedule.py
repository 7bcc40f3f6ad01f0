"""Learning-rate schedules. A new one is a function and an entry in ``SCHEDULES``."""

from __future__ import annotations

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
    number of steps or of minutes.
    """

    def __init__(self, optimizer: optim.Optimizer, kind: str = "cosine", warmup: float = 0.02, final: float = 0.1):
        self.decay, self.warmup, self.final = SCHEDULES[kind], warmup, final
        self.optimizers = getattr(optimizer, "optimizers", [optimizer])
        self.peaks = [float(one.learning_rate.item()) for one in self.optimizers]

    def factor(self, done: float) -> float:
        """Return the learning rate as a share of its peak."""
        if done < self.warmup:
            return done / self.warmup
        return self.final + (1 - self.final) * self.decay(done, self.warmup)

    def set(self, done: float) -> float:
        """Set the learning rates; return that of the last optimizer, which is AdamW."""
        factor = self.factor(done)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.learning_rate = peak * factor
        return self.peaks[-1] * factor
