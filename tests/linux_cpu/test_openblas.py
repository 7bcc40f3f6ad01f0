"""On Linux MLX multiplies with NumPy's OpenBLAS, and products with few rows are exact."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import ROOT, environment, the_line

PRODUCT = """
import mlx.core as mx, numpy as np, ctypes, time
mx.set_default_device(mx.cpu)
a = np.random.default_rng(0).standard_normal((300, 300), np.float32)
product = np.array(mx.array(a) @ mx.array(a).T)
print(float(np.abs(product - a.astype(np.float64) @ a.T.astype(np.float64)).max()))
times = []
a = mx.array(a)
for _ in range(5):
    start = time.process_time(); mx.eval(a @ a); times.append(time.process_time() - start)
print(2 * 300**3 / min(times) / 1e9)
"""


def in_python(code: str, **env: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(**env), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
def test_mlx_is_linked_to_openblas_with_numpys_wheel_and_a_compiler() -> None:
    code = f"from mlx_gpt.linux_cpu.openblas import use_numpy_openblas; print(use_numpy_openblas()){PRODUCT}"
    answer, error, speed = in_python(code, OPENBLAS_NUM_THREADS="1")
    if answer == "False":
        pytest.skip("no C compiler, or NumPy comes with another BLAS")
    _, mlx_speed = in_python(PRODUCT)
    assert float(error) < 1e-3
    assert float(speed) > 3 * float(mlx_speed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
def test_the_cached_library_is_used_without_a_compiler_unless_others_can_write_it(tmp_path: Path) -> None:
    link = "from mlx_gpt.linux_cpu.openblas import use_numpy_openblas; print(use_numpy_openblas())"
    here = {"LD_PRELOAD": "", "XDG_CACHE_HOME": str(tmp_path)}
    if in_python(link, **here) == ["False"]:
        pytest.skip("no C compiler, or NumPy comes with another BLAS")
    (kept,) = (tmp_path / "mlx_gpt").glob("blas-*.so")
    answer, error, _ = in_python(link + PRODUCT, PATH="", **here)
    assert answer == "True"
    assert float(error) < 1e-3
    kept.chmod(0o777)
    assert in_python(link, PATH="", **here) == ["False"]
    kept.chmod(0o700)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
def test_a_damaged_cached_library_is_compiled_again(tmp_path: Path) -> None:
    link = "from mlx_gpt.linux_cpu.openblas import use_numpy_openblas; print(use_numpy_openblas())"
    here = {"LD_PRELOAD": "", "XDG_CACHE_HOME": str(tmp_path)}
    if in_python(link, **here) == ["False"]:
        pytest.skip("no C compiler, or NumPy comes with another BLAS")
    (kept,) = (tmp_path / "mlx_gpt").glob("blas-*.so")
    whole = kept.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    other_code = b"no library" + hashlib.sha256(b"no library").digest()
    for damaged in (b"", whole[:10316], bytes(changed), other_code):
        kept.unlink()
        kept.write_bytes(damaged)
        kept.chmod(0o500)
        assert in_python(link, PATH="", **here) == ["False"]  # a truncated one would end the process at its first use
    assert in_python(link, **here) == ["True"]
    kept.unlink()
    for block in (kept.mkdir, lambda: (kept.rmdir(), os.mkfifo(kept))):
        block()
        assert in_python(link, **here) == ["True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
def test_the_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_gpt.cli import main

    monkeypatch.setenv("MLX_GPT_OPENBLAS", "foo")
    assert main(["generate", "nowhere"]) == 2
    assert the_line(capsys.readouterr().err) == "MLX_GPT_OPENBLAS must be 0 (off) or 1 (on), not 'foo'"
    for good in ("", "0", "1"):
        monkeypatch.setenv("MLX_GPT_OPENBLAS", good)
        assert main(["generate", "./nowhere"]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
def test_without_a_cache_it_is_compiled_in_each_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    link = "from mlx_gpt.linux_cpu.openblas import use_numpy_openblas; print(use_numpy_openblas())"
    first, again = (in_python(link, LD_PRELOAD="", XDG_CACHE_HOME=str(tmp_path / "file")) for _ in range(2))
    assert first == again == in_python(link, LD_PRELOAD="", XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only MLX for Linux lacks a fast BLAS")
@pytest.mark.parametrize(
    ("before", "env"),
    [("import mlx.core", {}), ("", {"PATH": ""}), ("", {"MLX_GPT_OPENBLAS": "0"})],
    ids=["mlx imported before", "no compiler", "turned off"],
)
def test_without_the_link_products_are_mlx_own(before: str, env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "XDG_CACHE_HOME": str(tmp_path)}
    code = f"{before}\nfrom mlx_gpt.linux_cpu import openblas as o; print(o.use_numpy_openblas()); o.set_threads(1)"
    answer, error, _ = in_python(code + PRODUCT, LD_PRELOAD="", **env)
    assert answer == "False"
    assert float(error) < 1e-3


FEW_ROWS = """
import mlx_gpt, mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
from mlx_gpt.linux_cpu.openblas import set_threads
rng = np.random.default_rng(0)
before = 0
for threads, m, n, k, transposed, bias in CASES:
    if threads != before:
        set_threads(threads)
        before = threads
    x, w, b = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (n, k), (n,)))
    matrix = mx.array(w).T if transposed else mx.array(np.ascontiguousarray(w.T))
    found = mx.addmm(mx.array(b), mx.array(x), matrix) if bias else mx.array(x) @ matrix
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + (b if bias else 0)
    numpys = x @ w.T + (b if bias else 0)
    error, numpys_error = (np.sqrt(np.mean((np.array(y) - exact) ** 2)) for y in (found, numpys))
    print(error / max(numpys_error, 6e-8 * k**0.5))  # or one rounding of such a sum
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there MLX is linked to another BLAS")
def test_products_with_few_rows_are_no_less_exact_than_numpys() -> None:
    """Rows and columns that fill no tile, terms that fill no vector; matrices with and without shared work."""
    shapes = [(1, 1), (2, 5), (7, 33), (100, 65), (1700, 60), (301, 768), (800, 3072), (13, 8200)]
    cases = [
        (threads, m, n, k, transposed, bias)
        for threads, transposed, bias in ((1, True, False), (3, True, True), (2, False, True))
        for m in (1, 2, 4, 5, 8, 9, 40, 41)
        for n, k in shapes
    ]
    ratios = [float(ratio) for ratio in in_python(FEW_ROWS.replace("CASES", str(cases)))]
    for (*case, transposed, _), ratio in zip(cases, ratios, strict=True):
        # Rounding errors are random; OpenBLAS computes what is not transposed. A wrong sum would be off by thousands.
        assert ratio < (2 if transposed else 6), (case, transposed)


TOGETHER = """
import mlx_gpt, mlx.core as mx, threading
mx.set_default_device(mx.cpu)
from mlx_gpt.linux_cpu.openblas import set_threads
w = mx.random.randint(-4, 5, (3000, 256), key=mx.random.key(0)).astype(mx.float32)  # integers: sums are exact
x = mx.random.randint(-4, 5, (48, 256), key=mx.random.key(1)).astype(mx.float32)
wanted = x @ w.T
mx.eval(w, x, wanted)

def work(first, found):
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        for i in range(60):
            row = (first + i) % 48
            found.append(mx.array_equal(x[row : row + 1] @ w.T, wanted[row : row + 1]).item())

for threads in (4, 1, 2, 4):  # helper threads sleep meanwhile, or are too many
    set_threads(threads)
    results = [[], [], []]
    workers = [threading.Thread(target=work, args=(7 * i, found)) for i, found in enumerate(results)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    print(all(len(found) == 60 and all(found) for found in results))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there MLX is linked to another BLAS")
def test_streams_that_multiply_at_the_same_time_get_their_own_products() -> None:
    assert in_python(TOGETHER) == ["True"] * 4


IDLE = """
import time, mlx_gpt, mlx.core as mx
a = mx.random.normal((1024, 1024))
mx.eval(a @ a)
before = time.process_time()
time.sleep(0.2)
print(time.process_time() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there MLX is linked to another BLAS")
def test_idle_threads_release_their_cores() -> None:
    assert float(in_python(IDLE, OPENBLAS_NUM_THREADS="2")[0]) < 0.03  # OpenBLAS by itself keeps them for 0.1 s


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not imported on other systems")
def test_status_says_what_is_in_use_and_why_not() -> None:
    code = "import mlx_gpt, mlx_gpt.linux_cpu, json; print(json.dumps(mlx_gpt.linux_cpu.status()))"

    def status(before: str = "", **env: str) -> dict[str, object]:
        return json.loads(" ".join(in_python(before + code, **env)))  # type: ignore[no-any-return]

    assert status(MLX_GPT_OPENBLAS="0")["openblas"] == "off: MLX_GPT_OPENBLAS=0"
    late = status("import mlx.core;", LD_PRELOAD="")
    assert late["openblas"] == "not linked: mlx was imported before mlx_gpt"
    assert isinstance(late["cores"], int)
    device = "import mlx.core as mx; mx.set_default_device(mx.cpu);"
    assert status(device, LD_PRELOAD="")["kernels"] is True
