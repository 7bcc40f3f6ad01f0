"""A check of Python and system before the installation: ``python3 mlx_gpt/supported.py``.

macOS brings Python 3.9, whose pip fails on this package with a message about setup.py. Runs on Python 3.7 and newer,
and imports nothing of this package.
"""

from __future__ import annotations

import platform
import sys

PYTHON = (3, 10)
MACOS = 14  # of MLX's wheels
REMEDY = "uv venv -p 3.12 --seed .venv, or brew install python@3.12 and then python3.12 -m venv .venv"


def problem(version: tuple[int, ...], system: str, machine: str, macos: str) -> str | None:
    """Return what is missing in one line, or None. ``macos`` is the system's version there, such as "14.5"."""
    if version[:2] < PYTHON:
        found, needed = (".".join(map(str, numbers)) for numbers in (version[:2], PYTHON))
        return f"mlx_gpt needs Python {needed} or newer, and this is {found}; a newer one: {REMEDY}"
    if system not in ("Darwin", "Linux"):
        return f"mlx_gpt runs on macOS and Linux, not on {system}"
    if system == "Darwin" and machine != "arm64":
        return f"MLX needs Apple silicon, and this Python is for {machine} (Intel, or Rosetta); {REMEDY}"
    if system == "Darwin" and macos and int(macos.partition(".")[0]) < MACOS:
        return f"MLX needs macOS {MACOS} or newer, and this is {macos}; update the system"
    return None


if __name__ == "__main__":
    sys.exit(problem(sys.version_info[:3], platform.system(), platform.machine(), platform.mac_ver()[0]))
