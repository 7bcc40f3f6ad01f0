"""A private folder for the kernels that MLX's CPU backend compiles.

MLX runs g++ in ``mlx/VERSION/cpu`` of the temporary folder and loads what it finds there, whoever owns it: another user
could place code in it, two processes write the same files, and a kernel that was cut short fails in every run
(mlx/backend/cpu/compiled.cpp). Here each process takes a folder of its own, the first that no other one holds, in one
that only its user can enter. At its start the kernels that are not as a process left them at its end are removed.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_gpt.files import cache_folder, try_lock

VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # of C++'s temp_directory_path, in its order
ROOM = 16 << 20  # bytes; a kernel and its source take 20 KB
MAX_PROCESSES = 200  # of this user at once
IN_USE = "in use"
SLOW = 2.0  # seconds of compilation after which it is reported
PAUSE = 10.0  # seconds without a new file after which compilation has ended
POLL = 0.25

taken: Path | None = None  # the folder of this process
outcome = "not set up: mlx_gpt has not been imported"


def use_private_folder() -> None:
    """Let MLX compile in a private folder, or not at all where there is none; ``outcome`` says why.

    Changes one variable of the environment as MLX and compilers see it; ``os.environ`` and ``tempfile`` keep theirs.
    The last variable has no other reader, so that it is taken where the others are not set.
    """
    global outcome, taken
    reasons = []
    for base in _bases():
        try:
            folder = _take(base)
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
            continue
        os.putenv(next((name for name in VARIABLES if name in os.environ), VARIABLES[-1]), str(folder))
        atexit.register(_mark, folder, os.getpid())
        taken = folder
        outcome = IN_USE
        return
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    outcome = f"off: no folder to compile in ({'; '.join(reasons)})"


@contextmanager
def compilation_reported(report: Callable[[], None]) -> Iterator[None]:
    """Call ``report``, once and from another thread, if MLX compiles kernels in this block for ``SLOW`` seconds."""
    folder, ended = taken, threading.Event()

    def last_file() -> float:
        return max((place.stat().st_mtime for place in folder.glob("mlx/*/cpu")), default=0.0) if folder else 0.0

    def watch() -> None:
        began = last = last_file()
        while not ended.wait(POLL):
            previous, last = last, last_file()
            began = last if last - previous > PAUSE else began
            if last - began >= SLOW:
                report()
                break

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bases() -> Iterator[Path]:
    with suppress(OSError):  # no folder is writable
        name, folder = f"mlx_gpt-{os.geteuid()}", Path(tempfile.gettempdir())
        yield folder.parent if folder.parent.name == name else folder / name  # the first in a child of such a process
    yield cache_folder() / f"kernels-{os.uname().nodename}"  # of this processor, if the home is on a network


def _take(base: Path) -> Path:
    """Return a folder in ``base`` that no other process uses, held until this one ends. Raises ``OSError``."""
    base.parent.mkdir(parents=True, exist_ok=True)
    base.mkdir(mode=0o700, exist_ok=True)
    _check(base)
    for folder in (base / str(n) for n in range(MAX_PROCESSES)):
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)  # closed, and so released, by the system
        if try_lock(lock):
            for kernel, _ in _kernels(folder, marked=False):
                os.unlink(kernel)
            _share(base, folder)
            return folder
        os.close(lock)
    raise OSError(errno.ENOLCK, "no locks")


def _check(base: Path) -> None:
    """Raise ``OSError`` unless code can be written to and run from a folder, by this user alone."""
    state, space = base.lstat(), os.statvfs(base)
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise OSError(errno.EPERM, "not a folder of this user alone")
    if space.f_flag & os.ST_NOEXEC:
        raise OSError(errno.EACCES, "noexec: the system runs no code from it")
    if space.f_flag & os.ST_RDONLY or not os.access(base, os.W_OK | os.X_OK):
        raise OSError(errno.EROFS, "not writable")
    if space.f_bavail * space.f_frsize < ROOM:
        raise OSError(errno.ENOSPC, "no space left on its disk")
    if set(str(base)) & set('"$`\\\n'):  # MLX passes it to a shell
        raise OSError(errno.EINVAL, "a name that a shell reads otherwise")


def _share(base: Path, folder: Path) -> None:
    """Link the kernels in the folders of other processes that are not in this one."""
    have = {_key(kernel) for kernel, _ in _kernels(folder, marked=True)}
    with suppress(OSError):  # one that is removed meanwhile
        for other in base.iterdir():
            for kernel, _ in _kernels(other, marked=True, besides=have):
                have.add(_key(kernel))
                (folder / kernel.relative_to(other)).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    os.link(kernel, folder / kernel.relative_to(other))


def _key(kernel: Path) -> tuple[str, str]:
    """Return MLX's version and the name of a kernel."""
    return kernel.parent.parent.name, kernel.name


def _mark(folder: Path, process: int) -> None:
    """Set the time of change of each kernel to its size, in seconds since 1970, which no later change keeps."""
    if os.getpid() == process:  # not in a fork
        for kernel, state in _kernels(folder, marked=False):
            os.utime(kernel, (state.st_atime, state.st_size))


def _kernels(
    folder: Path, marked: bool, besides: Set[tuple[str, str]] = frozenset()
) -> Iterator[tuple[Path, os.stat_result]]:
    for place in folder.glob("mlx/*/cpu"):
        version = place.parent.name
        for entry in os.scandir(place):
            if entry.name.endswith(".so") and (version, entry.name) not in besides:
                state = entry.stat(follow_symlinks=False)
                if (state.st_mtime == state.st_size) == marked:
                    yield Path(entry.path), state
