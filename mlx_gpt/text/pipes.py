"""Standard input (``-``) and process substitution (``/dev/fd/63``) as files: copied once, since text is read twice."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from mlx_gpt.errors import DataError

STDIN = "-"
DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/([0-9]+)")


def is_pipe(name: str) -> bool:
    """Return True for ``-`` and for the name of an open file descriptor."""
    return name in (STDIN, "/dev/stdin") or bool(DESCRIPTOR.fullmatch(name))


def copy_pipe(name: str) -> Path:
    """Copy standard input or an open file descriptor to a temporary file, once. Raises ``DataError``."""
    found = DESCRIPTOR.fullmatch(name)
    descriptor = int(found[1]) if found else 0
    try:
        if descriptor == 0:
            return _copy_stdin(sys.stdin)
        return _copy_descriptor(descriptor, os.fstat(descriptor).st_ino)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def with_names_of_pipes(message: str) -> str:
    """Return a message with the names that the user gave in place of those of the copies."""
    if not _folder.cache_info().currsize:  # no pipe was copied
        return message
    return re.sub(rf"{re.escape(str(_folder()))}/(?:stdin|fd-(\d+)-\d+)", _name_of, message)


def _name_of(copy: re.Match[str]) -> str:
    return f"/dev/fd/{copy[1]}" if copy[1] else STDIN


def is_copy(path: Path) -> bool:
    """Return True for the copy of a pipe."""
    return path.parent == _folder()


@cache
def _copy_stdin(stdin: Any) -> Path:
    if stdin is None or stdin.isatty():
        raise DataError("-: expected text from a pipe, but standard input is none; give a file, or use a pipe")
    return _write("stdin", stdin.buffer)


@cache
def _copy_descriptor(descriptor: int, inode: int) -> Path:
    if os.isatty(descriptor):
        raise DataError(f"/dev/fd/{descriptor}: expected a pipe, found a terminal; give a file, or use a pipe")
    with open(os.dup(descriptor), "rb") as stream:
        return _write(f"fd-{descriptor}-{inode}", stream)


def _write(name: str, stream: BinaryIO) -> Path:
    path = _folder() / name
    with path.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
    return path


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="mlx_gpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
