"""On Linux, fast matrix products for MLX's CPU backend: NumPy's OpenBLAS, lent to it.

MLX's CPU wheel for Linux multiplies with the reference BLAS, which uses one core and no vector unit. NumPy's wheel, in
the same environment, brings OpenBLAS: about thirty times the speed, and a third of the rounding. MLX calls its BLAS by
one name, ``cblas_sgemm``, and the dynamic linker gives that name to whoever offered it first: here a few lines of C,
compiled on the spot, that pass the call on. Without a C compiler, without NumPy's own wheel, or where another BLAS has
been preloaded already, everything stays as it is. On a Mac there is nothing to do: MLX multiplies by Accelerate there,
and on the GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = {  # in NumPy's wheels, and what they call their sgemm: its integers have 64 bits, MLX's 32
    "libscipy_openblas64_*": "scipy_cblas_sgemm64_",
    "libopenblas64_*": "cblas_sgemm64_",
}
SET_THREADS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_")
PASS_ON = """
#include <stdint.h>
void NAME(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float,
          float *, int64_t);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  NAME(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


def lend_openblas() -> bool:
    """Let MLX multiply with OpenBLAS, if MLX has not been imported yet: then its names are bound. Whether it does."""
    if not sys.platform.startswith("linux"):
        return False
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # preloaded, or lent before
        return True
    if "mlx.core" in sys.modules:
        return False
    found, compiler = _numpys_openblas(), shutil.which("cc") or shutil.which("g++")
    if not (found and compiler):
        return False
    library, name = found
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "pass_on.c", Path(folder) / "pass_on.so"
        source.write_text(PASS_ON.replace("NAME", name), encoding="ascii")
        flags = ["-xc", "-O1", "-shared", "-fPIC", f"-Wl,-rpath,{library.parent}"]
        command = [compiler, *flags, str(source), "-o", str(made), "-xnone", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        try:
            ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            return False
    return True


def set_threads(n: int) -> None:
    """How many threads OpenBLAS, lent or preloaded, shares a product among. Other BLASes are left alone."""
    for library in [ctypes.CDLL(None), *([ctypes.CDLL(str(found[0]))] if (found := _numpys_openblas()) else [])]:
        for name in SET_THREADS:
            if hasattr(library, name):
                getattr(library, name)(n)


def _numpys_openblas() -> tuple[Path, str] | None:
    """OpenBLAS as NumPy's wheel brings it, and what its sgemm is called."""
    import numpy as np

    for pattern, name in LIBRARIES.items():
        for library in (Path(np.__file__).parent.parent / "numpy.libs").glob(pattern):
            if hasattr(ctypes.CDLL(str(library)), name):
                return library, name
    return None
