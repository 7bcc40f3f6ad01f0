"""Keep a Mac awake while it trains: idle sleep would stop the training and its clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

CAFFEINATE = "/usr/bin/caffeinate"  # part of macOS


def keep_awake(report: Callable[[str], object]) -> None:
    """Hold off idle sleep on macOS until this process ends, and ``report`` so in a line; do nothing elsewhere."""
    if sys.platform != "darwin":
        return
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        # -i: no idle sleep; -w: until the process ends, however it ends. Its own session: Ctrl-C does not reach it.
        subprocess.Popen([CAFFEINATE, "-i", "-w", str(os.getpid())], start_new_session=True, **streams)
    except OSError as error:
        report(f"this Mac may fall asleep and stop the training ({CAFFEINATE}: {error.strerror})")
        return
    report("this Mac stays awake while it trains; --allow-sleep lets it fall asleep")
