"""Read untrusted small files, write files atomically, hash them, and name the cache folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any


def read_small(file: Path, limit: int) -> bytes:
    """Read a file of at most ``limit`` bytes. Raises ``OSError``, also for a longer file, a device or a pipe."""
    mode = os.stat(file).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a file but a device or a pipe")
    with open(file, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8. Raises ``ValueError``, also for a duplicate name or too deep a nesting."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=unique_names)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write a file or a new folder to; at the end, flush it to disk and move it to ``path``.

    On any error ``path`` is as it was and nothing is left beside it. The parent of ``path`` must exist.
    """
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=path.parent))
    try:
        hidden = staging / path.name
        yield hidden
        for written in (*hidden.rglob("*"), hidden):
            fsync(written)
        os.replace(hidden, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder for downloads and compiled code: ``$XDG_CACHE_HOME/mlx_gpt``, or ``~/.cache/mlx_gpt``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mlx_gpt"  # the XDG rule: ignore relative paths


def unused(path: Path) -> Path:
    """Return the path if nothing exists there, else with the first free number from 2 on: ``mine-2``."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of a JSON object. Raises ``ValueError`` for a duplicate name."""
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"duplicate name {name!r:.80}")
        value[name] = item
    return value
