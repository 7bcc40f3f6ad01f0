"""MLX compiles in a folder of this user alone; damaged kernels are compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import ROOT, environment

from mlx_gpt.terminal import COMPILING

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there MLX compiles with g++")

if sys.platform.startswith("linux"):
    from mlx_gpt.linux_cpu import kernel_folder

COMPILE = """
import mlx_gpt, mlx.core as mx
from mlx_gpt.linux_cpu import kernel_folder
mx.set_default_device(mx.cpu)
f = mx.compile(lambda x: mx.exp(x) * 2 + 1)
print(float(f(mx.zeros((3,)))[0]), kernel_folder.outcome)
"""


def run(code: str, folder: Path, **env: str) -> str:
    """Return what Python prints with a temporary folder and a cache below ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**{"TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "cache")} | env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an empty temporary folder."""
    (tmp_path / "tmp").mkdir()
    return tmp_path


def kernels(place: Path) -> list[Path]:
    found = list((place / "tmp" / f"mlx_gpt-{os.geteuid()}").glob("*/mlx/*/cpu/*.so"))
    if not found:
        pytest.skip("MLX does not compile here: no g++")
    return found


def test_only_this_user_can_enter_the_folder(place: Path) -> None:
    assert run(COMPILE, place) == "3.0 in use"
    (kernel,) = kernels(place)
    assert not (place / "tmp/mlx").exists()
    base = place / "tmp" / f"mlx_gpt-{os.geteuid()}"
    assert base.stat().st_mode & 0o777 == 0o700
    before = kernel.stat()
    assert run(COMPILE, place) == "3.0 in use"
    after = kernel.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not compiled again


def test_damaged_kernels_are_compiled_again(place: Path) -> None:
    run(COMPILE, place)
    (kernel,) = kernels(place)
    whole = kernel.read_bytes()
    for damaged in (b"", whole[:5000], bytes(len(whole))):
        kernel.write_bytes(damaged)
        assert run(COMPILE, place) == "3.0 in use"
        assert len(kernel.read_bytes()) == len(whole)


def test_the_kernels_of_a_killed_process_are_compiled_again(place: Path) -> None:
    run(f"{COMPILE}\nimport os; os._exit(0)", place)
    (kernel,) = kernels(place)
    kernel.write_bytes(kernel.read_bytes()[:5000])
    assert run(COMPILE, place) == "3.0 in use"


def test_processes_at_the_same_time_have_folders_of_their_own(place: Path) -> None:
    child = (
        f"import sys, subprocess\nprint(subprocess.check_output([sys.executable, '-c', '''{COMPILE}'''], text=True))"
    )
    assert run(COMPILE + child, place).split("\n") == ["3.0 in use", "3.0 in use"]
    assert {kernel.relative_to(place / "tmp").parts[1] for kernel in kernels(place)} == {"0", "1"}


def test_a_new_folder_begins_with_the_kernels_of_the_others(place: Path) -> None:
    run(COMPILE, place)
    child = (
        f"import sys, subprocess\nprint(subprocess.check_output([sys.executable, '-c', '''{COMPILE}'''], text=True))"
    )
    assert run(f"import mlx_gpt\n{child}", place) == "3.0 in use"
    first, second = kernels(place)
    assert first.samefile(second)


def test_a_process_begins_with_the_kernels_that_others_left(place: Path) -> None:
    other = COMPILE.replace("* 2", "* 3")
    child = f"import sys, subprocess\nsubprocess.check_output([sys.executable, '-c', '''{other}'''], text=True)"
    run(COMPILE, place)
    run(f"import mlx_gpt\n{child}", place)  # the child compiles in the second folder, while the first is held
    before = {kernel.relative_to(place).parts[2] for kernel in kernels(place)}
    assert (before, len(kernels(place))) == ({"0", "1"}, 3)
    run("import mlx_gpt", place)
    assert len({kernel for kernel in kernels(place) if kernel.relative_to(place).parts[2] == "0"}) == 2


def test_the_temporary_folder_of_python_stays(place: Path) -> None:
    code = "import mlx_gpt, tempfile, os; print(tempfile.gettempdir(), os.environ['TMPDIR'])"
    assert run(code, place) == f"{place}/tmp {place}/tmp"


def test_a_folder_that_others_could_write_is_not_used(place: Path) -> None:
    base = place / "tmp" / f"mlx_gpt-{os.geteuid()}"
    for block in (
        lambda: base.mkdir(mode=0o755),
        lambda: (base.rmdir(), base.symlink_to(place)),
        lambda: (base.unlink(), base.touch()),
    ):
        block()
        assert run(COMPILE, place) == "3.0 in use"
    assert not list(place.glob("mlx*"))
    assert list((place / "cache/mlx_gpt").glob("kernels-*/0"))


@pytest.mark.parametrize("name", ["$HOME", "a`id`", 'a"b', "a\\b"])
def test_a_name_that_a_shell_would_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(mode=0o700)
    with pytest.raises(OSError, match="a name that a shell reads otherwise"):
        kernel_folder._check(tmp_path / name)


def test_for_a_name_that_a_shell_would_read_the_cache_is_used(place: Path) -> None:
    (place / "$HOME").mkdir()
    assert run(COMPILE, place, TMPDIR=str(place / "$HOME")) == "3.0 in use"
    assert list((place / "cache/mlx_gpt").glob("kernels-*/0"))


def test_without_any_folder_nothing_is_compiled(place: Path) -> None:
    (place / "cache").touch()
    (place / "tmp" / f"mlx_gpt-{os.geteuid()}").touch()
    assert run(COMPILE, place).startswith("3.0 off: no folder to compile in")
    shown = subprocess.run(
        [sys.executable, "-m", "mlx_gpt", "generate", "./nowhere"],
        env=environment(TMPDIR=str(place / "tmp"), XDG_CACHE_HOME=str(place / "cache")),
        capture_output=True,
        text=True,
    ).stderr.splitlines()
    assert shown[0].startswith(
        "mlx-gpt: MLX compiles no kernels, which takes more time: off: no folder to compile in ("
    )
    assert len(shown) == 2


@pytest.mark.parametrize(("seconds", "reports"), [(0.1, 0), (0.6, 1)])
def test_compilation_that_takes_long_is_reported_once(
    seconds: float, reports: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mlx/0/cpu"
    place.mkdir(parents=True)
    for name, value in {"taken": tmp_path, "SLOW": 0.3, "POLL": 0.02}.items():
        monkeypatch.setattr(kernel_folder, name, value)
    found: list[str] = []
    with kernel_folder.compilation_reported(lambda: found.append("slow")):
        for i in range(7):
            (place / f"{i}.so").touch()
            time.sleep(seconds / 6)
    assert len(found) == reports


def test_a_command_reports_its_first_compilation_in_a_line(place: Path) -> None:
    code = "from mlx_gpt.linux_cpu import kernel_folder; kernel_folder.SLOW = 0.01; kernel_folder.POLL = 0.005\n"
    code += "import sys; from mlx_gpt.cli import main; sys.stderr = sys.stdout\n"
    code += f"main(['generate', {str(ROOT / 'weights/tinyworld')!r}, '--max-tokens', '3', '--no-figures'])"
    first, second = run(code, place), run(code, place)
    kernels(place)
    assert first.count(f"mlx-gpt: {COMPILING}\n") == 1
    assert COMPILING not in second
