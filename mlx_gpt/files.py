"""Read untrusted small files, write files atomically, hash them, and name the cache folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

LOCK = ".lock"  # in a folder that one process at a time writes to
LEFTOVER = re.compile(r"\.(saving|removed)-[a-z0-9_]{8}")  # a folder of tempfile.mkdtemp, if its process was killed


def expand_user(name: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder for a leading ``~``; one of an unknown user, ``~nobody/a``, as it is."""
    return Path(os.path.expanduser(name))


def read_small(file: Path, limit: int) -> bytes:
    """Read a file of at most ``limit`` bytes. Raises ``OSError``, also for a longer file, a device or a pipe."""
    with open_file(file) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes")
    return content


def open_file(file: Path) -> BinaryIO:
    """Open a file to read bytes. Raises ``OSError``, also for a device or a pipe, which could be endless or wait."""
    mode = os.stat(file).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a file but a device or a pipe", str(file))
    return open(file, "rb")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8. Raises ``ValueError``, also for a duplicate name or too deep a nesting."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=unique_names)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write a file or a new folder to; at the end, flush it to disk and move it to ``path``.

    On any error ``path`` is as it was and nothing is left beside it. The parent of ``path`` must exist. Of a link the
    target is replaced. Raises ``OSError``, as ``check_replaceable`` does.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    with hidden_folder(path.parent) as staging:
        hidden = staging / path.name
        yield hidden
        for written in (*hidden.rglob("*"), hidden):
            fsync(written)
        if path.is_dir():  # a folder is replaced only if it is empty
            (path / ".DS_Store").unlink(missing_ok=True)
        os.replace(hidden, path)
        fsync(path.parent)


def check_replaceable(path: Path) -> None:
    """Raise ``OSError`` if a device, a pipe or a socket is at a path, or behind a link: a write would remove it."""
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            reason = "a device or a pipe, not a regular file"
            raise OSError(errno.EINVAL, reason, str(path))


@contextmanager
def hidden_folder(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder in ``parent``, removed at the end; first remove those that killed processes left.

    A process holds a lock on its own, so that no other removes it.
    """
    remove_leftovers(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=parent))
        with suppress(FileNotFoundError):  # removed before it was locked, as a leftover
            descriptor = os.open(folder, os.O_RDONLY)
            if try_lock(descriptor) is not False and folder.exists():
                return folder, descriptor
            os.close(descriptor)


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden folders of killed processes, where a lock shows that the process has ended."""
    for folder in parent.glob(".*"):
        if LEFTOVER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):  # another user's, or removed meanwhile
                descriptor = os.open(folder, os.O_RDONLY)
                if try_lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def is_vacant(folder: Path) -> bool:
    """Return True if a folder does not exist, or holds nothing but what a killed process or macOS's Finder left."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(path.name in (LOCK, ".DS_Store") or LEFTOVER.fullmatch(path.name) for path in folder.iterdir())


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder: True, False if another has locked it, None if the file system has no locks.

    The system releases the lock when the descriptor is closed or the process ends, however it ends.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # also a folder on NFS, where Linux locks only what is open for writing
        return None
    return True


def atomic_write(file: Path, content: str | bytes) -> None:
    """Write a whole file or nothing, flushed to disk; text is encoded as UTF-8. Raises ``OSError``."""
    with atomic_path(file) as hidden:
        hidden.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk: afterwards it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # where fsync leaves data in the drive's cache (man 2 fsync)
            with suppress(OSError):  # a network share may not support it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex. Raises ``OSError``, as ``open_file`` does."""
    digest = hashlib.sha256()
    with open_file(file) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder for downloads and compiled code: ``$XDG_CACHE_HOME/mlx_gpt``, or ``~/.cache/mlx_gpt``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mlx_gpt"  # the XDG rule: ignore relative paths


def numbered(path: Path) -> Iterator[Path]:
    """Yield ``mine``, ``mine-2``, ``mine-3``, ..."""
    return chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))


def unused(path: Path) -> Path:
    """Return the first of the ``numbered`` paths where nothing exists."""
    return next(free for free in numbered(path) if not free.exists())


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of a JSON object. Raises ``ValueError`` for a duplicate name."""
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"duplicate name {name!r:.80}")
        value[name] = item
    return value
