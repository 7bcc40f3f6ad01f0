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

LIBRARIES = {  # in NumPy's wheels, and what stands around a name in them: their integers have 64 bits, MLX's 32
    "libscipy_openblas64_*": ("scipy_cblas_", "64_"),
    "libopenblas64_*": ("cblas_", "64_"),
}
SET_THREADS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_")
PASS_ON = """
#include <stdint.h>
void NAMEsgemmEND(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                  float, float *, int64_t);
void NAMEsgemvEND(int, int, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float, float *,
                  int64_t);
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
enum { LONG = 1024, PART = 256, FEW = 8 };
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  // One row, as in decoding: sgemm would copy the matrix, unless it is small.
  if (order == ROW_MAJOR && m == 1 && ta == NO_TRANS && (int64_t)n * k > 1000000) {
    if (tb == TRANS) NAMEsgemvEND(order, NO_TRANS, n, k, alpha, b, ldb, a, 1, beta, c, 1);
    else NAMEsgemvEND(order, TRANS, k, n, alpha, b, ldb, a, 1, beta, c, 1);
  } else if (order == ROW_MAJOR && m > FEW && k >= LONG && ta == NO_TRANS && tb == TRANS) {
    // A layer with long rows, x W^T: in parts, or the last terms of a row are rounded as the whole sum is.
    for (int at = 0; at < k; at += PART)
      NAMEsgemmEND(order, ta, tb, m, n, k - at < PART ? k - at : PART, alpha, a + at, lda, b + at, ldb,
                   at ? 1 : beta, c, ldc);
  } else NAMEsgemmEND(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""

_lent = False


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
    library, (start, end) = found
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "pass_on.c", Path(folder) / "pass_on.so"
        source.write_text(PASS_ON.replace("NAME", start).replace("END", end), encoding="ascii")
        flags = ["-xc", "-O1", "-shared", "-fPIC", f"-Wl,-rpath,{library.parent}"]
        command = [compiler, *flags, str(source), "-o", str(made), "-xnone", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        try:
            ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            return False
    global _lent
    _lent = True
    return True


def reads_in_place() -> bool:
    """Whether a product with one row reads its matrix where it lies, as the lent OpenBLAS is called here."""
    return _lent


def set_threads(n: int) -> None:
    """How many threads OpenBLAS, lent or preloaded, shares a product among. Other BLASes are left alone."""
    for library in [ctypes.CDLL(None), *([ctypes.CDLL(str(found[0]))] if (found := _numpys_openblas()) else [])]:
        for name in SET_THREADS:
            if hasattr(library, name):
                getattr(library, name)(n)


def _numpys_openblas() -> tuple[Path, tuple[str, str]] | None:
    """OpenBLAS as NumPy's wheel brings it, and what stands around its names."""
    import numpy as np

    for pattern, around in LIBRARIES.items():
        for library in (Path(np.__file__).parent.parent / "numpy.libs").glob(pattern):
            if hasattr(ctypes.CDLL(str(library)), "sgemm".join(around)):
                return library, around
    return None
