"""Small files that somebody else wrote: read only if they are files, as small as they should be, and sound JSON. And
where files of our own go."""

from __future__ import annotations

import errno
import json
import os
import stat
from itertools import chain, count
from pathlib import Path
from typing import Any


def read_small(file: Path, limit: int) -> bytes:
    """All bytes of a file. Raises ``OSError``, also where it has more than ``limit``, or is a pipe that never ends."""
    kind = os.stat(file).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(errno.EINVAL, "it is no file but a device or a pipe")
    with open(file, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ``ValueError``, also for a name given twice, or nesting too deep."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def cache_folder() -> Path:
    """Where downloads are kept, and what is made once: ``mlx_gpt`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mlx_gpt"  # the XDG rule: ignore relative paths


def unused(path: Path) -> Path:
    """The path itself if nothing is there, else with the first number, from 2, that is free: ``mine-2``."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"{name!r:.80} is there twice")
        value[name] = item
    return value
