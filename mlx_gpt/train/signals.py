"""The signals that end a run: Ctrl-C, SIGTERM (schedulers, ``docker stop``) and SIGHUP (a closed terminal).

A signal that is ignored when the run starts, as SIGHUP is under ``nohup``, stays ignored, and another program's handler
stays installed. Only the main thread can install handlers: in another one these functions do nothing.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

from mlx_gpt.errors import Stopped

Handler = Callable[[int, FrameType | None], Any]


def end(signum: int, _: FrameType | None) -> None:
    """Raise ``Stopped``."""
    _leave_terminal(signum)
    raise Stopped(signum)


def interruptible() -> AbstractContextManager[None]:
    """Raise ``Stopped`` for SIGTERM and SIGHUP in the context, as Python raises ``KeyboardInterrupt`` for Ctrl-C."""
    return _handled(end, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred(wanted: bool = True) -> Iterator[Callable[[], int]]:
    """Defer the first signal: the yielded function returns its number, or 0. The second raises ``Stopped``.

    A second SIGHUP does not, since a terminal that is closed may send several. Does nothing unless ``wanted``.
    """
    first = 0

    def request(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if first and signum != signal.SIGHUP:
            end(signum, frame)
        _leave_terminal(signum)
        first = first or signum

    with _handled(request, *((signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if wanted else ())):
        yield lambda: first


@contextmanager
def remembered() -> Iterator[Callable[[], None]]:
    """Remember Ctrl-C: the yielded function raises ``KeyboardInterrupt`` again.

    Python raises it where the program is, and MLX drops an exception that arises while it converts an argument.
    """
    pressed = False

    def press(signum: int, _: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with _handled(press, signal.SIGINT):
        yield check


@contextmanager
def _handled(handler: Handler, *signals: int) -> Iterator[None]:
    """Install a handler for those signals that have a default one or ``end``; restore these at the end."""
    replaceable = (signal.SIG_DFL, signal.default_int_handler, end)
    is_main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in signals if is_main and signal.getsignal(one) in replaceable}
    for one in before:
        signal.signal(one, handler)
    try:
        yield
    finally:
        for one, earlier in before.items():
            if signal.getsignal(one) is handler:
                signal.signal(one, earlier)


def _leave_terminal(signum: int) -> None:
    """After SIGHUP send stdout and stderr nowhere if they are a terminal: it is closed, and writing to it fails."""
    if signum != signal.SIGHUP:
        return
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
