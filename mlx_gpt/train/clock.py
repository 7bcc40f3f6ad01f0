"""How far a run is, and when it has been asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IN_HAND = 0.1  # of the time that a number of steps may take


class Clock:
    """How much of a run is done: by steps, or where ``n_steps`` is None by the time spent on steps.

    With both, ``minutes`` are the most that the steps may take, and a tenth of them is in hand: only when that is used
    up does the clock say how far the run is. ``seconds`` is what an earlier part of the run has spent already.
    """

    def __init__(self, n_steps: int | None, minutes: float | None, seconds: float = 0.0):
        self.n_steps, self.minutes = n_steps, minutes
        self._started = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Spent on steps so far."""
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not spent on steps."""
        since = time.perf_counter()
        yield
        self._started += time.perf_counter() - since

    def done(self, n: int) -> float:
        """The share of the run that is behind after n steps."""
        if self.minutes is None:
            assert self.n_steps
            return n / self.n_steps
        left = 1 - self.seconds() / (60 * self.minutes)
        if self.n_steps is None:
            return 1 - left
        return max(n / self.n_steps, 1 - left / (1 - IN_HAND))

    def left(self, n: int) -> float:
        """Seconds left, without evaluations and checkpoints."""
        done = self.done(n)
        return self.seconds() * (1 - done) / done if done else 0.0


@contextmanager
def deferred_ctrl_c(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """In here the first Ctrl-C only makes ``asked()`` true; the second one raises ``KeyboardInterrupt`` as ever.

    It stays as it is where that is not ``wanted``, where it is another than Python's own, or in another thread.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if wanted and usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        if signal.getsignal(signal.SIGINT) is ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)
