"""Contexts in which the user's functions are called: silenced, with a time limit, random states put back."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from inspect import CO_GENERATOR
from types import FrameType
from typing import Any, NoReturn

import numpy as np

CAUGHT = 2  # alarms that a call may catch; after more, each of its next lines raises
HERE = os.path.dirname(__file__)


class TimeIsUp(BaseException):
    """A call took too long. Not an ``Exception``, so that a user's own handler does not swallow it."""


@contextmanager
def silenced() -> Iterator[None]:
    """Drop what the user's functions print."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def exit_raised() -> Iterator[None]:
    """Let ``os._exit`` raise ``SystemExit``, except in a forked process, such as a worker that loads data."""
    leave, process = os._exit, os.getpid()

    def stop(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)
        raise SystemExit(status)

    os._exit = stop
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def time_limit(seconds: float, interrupts: list[int] | None = None) -> Iterator[None]:
    """Raise ``TimeIsUp`` after some seconds, and again each second, at the next Python instruction.

    A function that catches it, as ``except BaseException`` in an endless loop does, has it raised in the handler too.
    Works in the main thread only, and where the system has SIGALRM; elsewhere a call runs to its end, as does one that
    never returns to Python. Ctrl-C is appended to ``interrupts``, to tell it from a ``KeyboardInterrupt`` that the
    function raises itself.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    active, alarms, tracing = True, 0, sys.gettrace()
    owner = next(frame for frame in stack_of(sys._getframe(1)) if not in_a_context(frame))

    def stop(signum: int, frame: Any) -> None:
        nonlocal alarms
        if active and all(caller is not owner for caller in stack_of(frame)):
            end()  # the alarm before came when the call was over, and was raised in place of this context's end
        elif active:
            alarms += 1
            if alarms > CAUGHT:
                raise_at_next_line(frame)
            raise TimeIsUp

    def interrupt(signum: int, frame: Any) -> None:
        (interrupts if interrupts is not None else []).append(signum)
        if callable(handlers[signal.SIGINT]):
            handlers[signal.SIGINT](signum, frame)

    handlers: dict[int, Any] = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop)
    if callable(handlers[signal.SIGINT]):
        signal.signal(signal.SIGINT, interrupt)

    def end() -> None:
        nonlocal active
        if not active:
            return
        active = False
        if alarms > CAUGHT:
            sys.settrace(tracing)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # an alarm set before is late by this call
        for number, handler in handlers.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)

    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        end()


def stack_of(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def in_a_context(frame: FrameType) -> bool:
    """Return True for the frames of a context manager, which are not on the stack while its body runs."""
    return bool(frame.f_code.co_flags & CO_GENERATOR) or frame.f_code.co_filename == contextlib.__file__


def raise_at_next_line(frame: Any) -> None:
    """Let each of the user's functions on the stack raise ``TimeIsUp`` at its next line."""

    def trace(frame: Any, event: str, argument: Any) -> None:
        if event == "line":
            raise TimeIsUp

    for caller in stack_of(frame):
        if caller.f_code.co_filename.startswith(HERE):
            break
        caller.f_trace = trace
    sys.settrace(trace)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of Python, NumPy, MLX and torch back at the end."""
    mx, torch = sys.modules.get("mlx.core"), sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    key = mx.random.state[0].tolist() if mx is not None else None
    state, grad = (torch.get_rng_state(), torch.is_grad_enabled()) if torch is not None else (None, None)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mx is not None and key is not None:
            mx.random.seed((key[0] << 32) | key[1])
        if torch is not None:
            torch.set_rng_state(state)
            torch.set_grad_enabled(grad)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states, torch's on the CPU only, and put the earlier ones back at the end."""
    mx, torch = sys.modules.get("mlx.core"), sys.modules.get("torch")
    with random_states_kept():
        random.seed(seed)
        np.random.seed(seed)
        if mx is not None:
            mx.random.seed(seed)
        if torch is not None:
            torch.default_generator.manual_seed(seed)
        yield
