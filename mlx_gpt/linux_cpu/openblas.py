"""Link the matrix products of MLX's CPU backend to the OpenBLAS in NumPy's wheel.

MLX's CPU wheel for Linux multiplies with the reference BLAS, which uses one core and no vector instructions. OpenBLAS
is about thirty times as fast, with a third of the rounding error. MLX calls ``cblas_sgemm``, and the dynamic linker
resolves that name to the first library that has it: here ``openblas.c``, compiled at the first import and kept in the
user's cache. It forwards to OpenBLAS, except for products with few rows, as in decoding, which it computes at the
speed of memory. ``MLX_GPT_OPENBLAS=0`` turns the link off; it needs a C compiler and NumPy's own wheel.
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

SWITCH = "MLX_GPT_OPENBLAS"
LIBRARIES = {  # in NumPy's wheels, with prefix and suffix of their names; their integers have 64 bits, MLX's 32
    "libscipy_openblas64_*": ("scipy_", "64_"),
    "libopenblas64_*": ("", "64_"),
}
SET_THREADS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_")
SOURCE = Path(__file__).with_suffix(".c")
TIMEOUT = "18"  # log2 of the cycles for which an idle thread of OpenBLAS keeps its core; 28 by default
CPU_FLAGS = ("-march=native", "-mtune=generic")  # the widest vectors; not every compiler knows the first
DIGEST = 32  # bytes of a SHA-256
IN_USE = "in use"

outcome = "not linked: mlx_gpt has not been imported first"


def use_numpy_openblas() -> bool:
    """Link MLX to NumPy's OpenBLAS, before MLX is imported. Returns whether it is linked; ``outcome`` says why not."""
    global outcome
    outcome = _link()
    return outcome == IN_USE


def _link() -> str:
    if os.environ.get(SWITCH, "") not in ("", "1"):
        return f"off: {SWITCH}={os.environ[SWITCH]}"
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # preloaded, or linked before
        return IN_USE
    if "mlx.core" in sys.modules:
        return "not linked: mlx was imported before mlx_gpt"
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", TIMEOUT)  # read when NumPy is imported: the next line
    found = _numpy_openblas()
    if not found:
        return "not linked: NumPy is not from its own wheel"
    cached = cache_folder() / f"blas-{_fingerprint(found[0])}.so"
    if _is_whole(cached) and _load(cached):
        return IN_USE
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / "blas.so"
            if not _compile(compiled, *found):
                return "not linked: no C compiler"
            loaded = (_store(compiled, cached) and _load(cached)) or _load(compiled)
    except OSError as error:
        return f"not linked: no temporary folder ({error.strerror})"
    return IN_USE if loaded else f"not linked: the system loads no code from {cached.parent} and {folder}"


def _compile(output: Path, library: Path, affixes: tuple[str, str]) -> bool:
    compiler = shutil.which("cc") or shutil.which("g++")
    prefix, suffix = affixes
    name = "##".join(filter(None, (prefix, "name", suffix)))
    flags = ["-xc", "-O2", f"-DOPENBLAS(name)={name}", "-shared", "-fPIC", "-pthread"]
    linked = ["-xnone", str(library), f"-Wl,-rpath,{library.parent}"]
    commands = ([compiler, *flags, cpu, str(SOURCE), "-o", str(output), *linked] for cpu in CPU_FLAGS if compiler)
    return any(not subprocess.run(command, capture_output=True, check=False).returncode for command in commands)


def _load(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _fingerprint(library: Path) -> str:
    """Return a hash of what the compiled code depends on: the source, NumPy's library and the processor."""
    fields = (b"model", b"flags", b"Features")
    cpu = {line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(fields)}
    size, changed = library.stat().st_size, library.stat().st_mtime_ns
    parts = [_read(SOURCE), f"{library} {size} {changed} {CPU_FLAGS}".encode(), *sorted(cpu)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _is_whole(file: Path) -> bool:
    """Return whether a library belongs to this user, no one else can write it, and it ends with its own SHA-256."""
    try:
        state = file.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            return False
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _store(compiled: Path, cached: Path) -> bool:
    """Keep a library, followed by its SHA-256, which the linker ignores."""
    with contextlib.suppress(OSError):  # without a cache it is compiled in each process
        cached.parent.mkdir(parents=True, exist_ok=True)
        content = compiled.read_bytes()
        with atomic_path(cached) as hidden:
            hidden.write_bytes(content + hashlib.sha256(content).digest())
            hidden.chmod(0o500)
        return True
    return False


def set_threads(n: int) -> None:
    """Set the number of threads of OpenBLAS, linked or preloaded. Other BLAS libraries are not changed."""
    for library in [ctypes.CDLL(None), *([ctypes.CDLL(str(found[0]))] if (found := _numpy_openblas()) else [])]:
        for name in SET_THREADS:
            if hasattr(library, name):
                getattr(library, name)(n)


def _numpy_openblas() -> tuple[Path, tuple[str, str]] | None:
    """Return the OpenBLAS library in NumPy's wheel, with the prefix and suffix of its names."""
    import numpy as np

    for pattern, affixes in LIBRARIES.items():
        for library in (Path(np.__file__).parent.parent / "numpy.libs").glob(pattern):
            if hasattr(ctypes.CDLL(str(library)), "cblas_sgemm".join(affixes)):
                return library, affixes
    return None
