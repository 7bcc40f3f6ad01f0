"""The progress of a run, by steps or by time, and Ctrl-C between its steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
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


@contextmanager
def deferred_ctrl_c(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Defer the first Ctrl-C: the yielded function returns True after it. The second raises ``KeyboardInterrupt``.

    Does nothing unless ``wanted``, in another thread than the main one, or if another handler is installed.
    """
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    replaceable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if wanted and replaceable and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        if signal.getsignal(signal.SIGINT) is request:
            signal.signal(signal.SIGINT, signal.default_int_handler)
