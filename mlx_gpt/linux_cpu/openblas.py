"""On Linux, fast matrix products for MLX's CPU backend: NumPy's OpenBLAS, lent to it.

MLX's CPU wheel for Linux multiplies with the reference BLAS, which uses one core and no vector unit. NumPy's wheel, in
the same environment, brings OpenBLAS: about thirty times the speed, and a third of the rounding. MLX calls its BLAS by
one name, ``cblas_sgemm``, and the dynamic linker gives that name to whoever offered it first: here ``blas.c``, compiled
on the spot and kept in the user's cache. It passes the call on, but for products with few rows: those it does itself,
as fast as the memory gives the matrix. Without a C compiler, without NumPy's own wheel, or where another BLAS has been
preloaded already, everything stays as it is. On a Mac there is nothing to do: MLX multiplies by Accelerate there, and
on the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_gpt.files import atomic_path, cache_folder

LIBRARIES = {  # in NumPy's wheels, and what stands around a name in them: their integers have 64 bits, MLX's 32
    "libscipy_openblas64_*": ("scipy_", "64_"),
    "libopenblas64_*": ("", "64_"),
}
SET_THREADS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_")
CODE = Path(__file__).with_suffix(".c")
PATIENCE = "18"  # log2 of the cycles for which OpenBLAS's threads, out of work, keep their cores; 28 unless told
FOR_THIS_CPU = ("-march=native", "-mtune=generic")  # its widest vectors; not every compiler knows them


def lend_openblas() -> bool:
    """Let MLX multiply with OpenBLAS, if MLX has not been imported yet: then its names are bound. Whether it does."""
    if not sys.platform.startswith("linux"):
        return False
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # preloaded, or lent before
        return True
    if "mlx.core" in sys.modules:
        return False
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", PATIENCE)  # read when NumPy is imported: the next line
    found = _numpys_openblas()
    if not found:
        return False
    kept = cache_folder() / f"blas-{_fingerprint(found[0])}.so"
    if _is_ours(kept) and _lend(kept):
        return True
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "blas.so"
        if not (_compile(made, *found) and _lend(made)):
            return False
        _keep(made, kept)
    return True


def _compile(made: Path, library: Path, around: tuple[str, str]) -> bool:
    compiler = shutil.which("cc") or shutil.which("g++")
    start, end = around
    name = "##".join(filter(None, (start, "name", end)))
    flags = ["-xc", "-O2", f"-DOPENBLAS(name)={name}", "-shared", "-fPIC", "-pthread"]
    linked = ["-xnone", str(library), f"-Wl,-rpath,{library.parent}"]
    commands = ([compiler, *flags, cpu, str(CODE), "-o", str(made), *linked] for cpu in FOR_THIS_CPU if compiler)
    return any(not subprocess.run(command, capture_output=True, check=False).returncode for command in commands)


def _lend(made: Path) -> bool:
    try:
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _fingerprint(library: Path) -> str:
    """Of all that the compiled code depends on: the code, NumPy's library, the processor."""
    told = (b"model", b"flags", b"Features")
    cpu = {line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(told)}
    size, changed = library.stat().st_size, library.stat().st_mtime_ns
    parts = [_read(CODE), f"{library} {size} {changed} {FOR_THIS_CPU}".encode(), *sorted(cpu)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _is_ours(file: Path) -> bool:
    """Whether nobody else wrote it, or can: it is code that will run."""
    try:
        state = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022


def _keep(made: Path, kept: Path) -> None:
    """Put it where the next process looks, or leave it where nothing can be kept."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as hidden:
            shutil.copyfile(made, hidden)
            hidden.chmod(0o500)


def set_threads(n: int) -> None:
    """Among how many threads OpenBLAS, lent or preloaded, shares a product, with few rows or many. No other BLAS."""
    for library in [ctypes.CDLL(None), *([ctypes.CDLL(str(found[0]))] if (found := _numpys_openblas()) else [])]:
        for name in SET_THREADS:
            if hasattr(library, name):
                getattr(library, name)(n)


def _numpys_openblas() -> tuple[Path, tuple[str, str]] | None:
    """OpenBLAS as NumPy's wheel brings it, and what stands around its names."""
    import numpy as np

    for pattern, around in LIBRARIES.items():
        for library in (Path(np.__file__).parent.parent / "numpy.libs").glob(pattern):
            if hasattr(ctypes.CDLL(str(library)), "cblas_sgemm".join(around)):
                return library, around
    return None
