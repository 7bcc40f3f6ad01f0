"""On Linux, fast matrix products for MLX's CPU backend: NumPy's OpenBLAS, lent to it.

MLX's CPU wheel for Linux multiplies with the reference BLAS, which uses one core and no vector unit. NumPy's wheel, in
the same environment, brings OpenBLAS: about thirty times the speed, and a third of the rounding. MLX calls its BLAS by
one name, ``cblas_sgemm``, and the dynamic linker gives that name to whoever offered it first: here ``blas.c``, compiled
on the spot, which passes the call on, but for products with few rows: those it does itself, as fast as the memory
gives the matrix. Without a C compiler, without NumPy's own wheel, or where another BLAS has been preloaded already,
everything stays as it is. On a Mac there is nothing to do: MLX multiplies by Accelerate there, and on the GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    found, compiler = _numpys_openblas(), shutil.which("cc") or shutil.which("g++")
    if not (found and compiler):
        return False
    library, (start, end) = found
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "blas.so")
        name = "##".join(filter(None, (start, "name", end)))
        flags = ["-xc", "-O2", f"-DOPENBLAS(name)={name}", "-shared", "-fPIC", "-pthread"]
        linked = ["-xnone", str(library), f"-Wl,-rpath,{library.parent}"]
        for cpu in FOR_THIS_CPU:
            command = [compiler, *flags, cpu, str(CODE), "-o", made, *linked]
            if not subprocess.run(command, capture_output=True, check=False).returncode:
                break
        try:
            ctypes.CDLL(made, mode=ctypes.RTLD_GLOBAL)
        except OSError:  # nothing was compiled, or it cannot be loaded
            return False
    return True


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
