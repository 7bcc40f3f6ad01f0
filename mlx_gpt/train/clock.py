"""The progress of a run, by steps or by time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

RESERVE = 0.1  # share of a time limit that a number of steps does not plan to use


class Clock:
    """Measure how much of a run is done: by steps, or if ``n_steps`` is None by the time spent on steps.

    With both, ``minutes`` is a limit, of which a tenth is a reserve: time sets the progress only once steps have used
    up the reserve. ``seconds`` is the time that earlier parts of the run took.
    """

    def __init__(self, n_steps: int | None, minutes: float | None, seconds: float = 0.0):
        self.n_steps, self.minutes = n_steps, minutes
        self._started = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Return the seconds spent on steps."""
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the context."""
        paused_at = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused_at

    def done(self, n: int) -> float:
        """Return the share of the run that is done after ``n`` steps; 1 or above: it is complete."""
        if self.minutes is None:
            assert self.n_steps
            return n / self.n_steps
        left = 1 - self.seconds() / (60 * self.minutes)
        if self.n_steps is None:
            return 1 - left
        return max(n / self.n_steps, 1 - left / (1 - RESERVE))

    def left(self, n: int) -> float:
        """Return the estimated seconds left, without evaluations and checkpoints."""
        done = self.done(n)
        return self.seconds() * (1 - done) / done if done else 0.0
