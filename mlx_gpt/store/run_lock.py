"""The lock of a run's folder: one process at a time writes there.

It is an ``flock`` on ``RUN/.lock``, which the system releases however the process ends (on NFS the server does, also
for a machine that is lost). A file that is not locked means nothing. While it is, it names its process.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from mlx_gpt.errors import FolderInUseError, MLXGPTError
from mlx_gpt.files import LOCK, try_lock

ATTEMPTS = 1000  # to create a folder and its lock while other processes remove theirs

_held = threading.local()


@contextmanager
def locked(folder: Path, report: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist and removed if it is still empty at the end.

    A thread that holds it may lock it again. Raises ``FolderInUseError`` if another process or thread has it, and
    ``MLXGPTError`` if the folder cannot be written to. Where the file system has no locks, this is reported.
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    if (resolved := folder.resolve()) in held:
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _lock(folder, report)
    held.add(resolved)
    try:
        yield
    finally:
        held.remove(resolved)
        with suppress(OSError):  # the folder may have been removed
            if _is_at(descriptor, folder / LOCK):
                (folder / LOCK).unlink()
        with suppress(OSError):  # the first that is not empty
            for path in created:
                path.rmdir()
        os.close(descriptor)


def _lock(folder: Path, report: Callable[[str], None]) -> int:
    """Return the open and locked file of a folder; it has been written by this process."""
    file = folder / LOCK
    for attempt in count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if isinstance(error, (FileNotFoundError, FileExistsError)) and attempt < ATTEMPTS:
                continue  # its process has ended, and removed the empty folder, also while mkdir looked for it
            raise MLXGPTError(
                f"{folder}: cannot be written ({error.strerror}); a run needs a folder of its own that it can write to"
            ) from error
        is_locked = try_lock(descriptor)
        if is_locked is False:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderInUseError(
                f"{folder}: another run writes to it ({holder}); wait until it has ended, or choose another folder"
            )
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its process has ended, and removed it
    if is_locked is None:
        report(f"{folder}: this file system has no locks; make sure that no other run writes to the folder")
    with suppress(OSError):  # a full disk
        os.truncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(descriptor, f"pid {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Return what the holder of a lock has written, which it does just after locking."""
    for _ in range(20):
        if content := os.pread(descriptor, 300, 0):
            return content.decode(errors="replace").strip()
        time.sleep(0.05)
    return "a process that has not named itself"
