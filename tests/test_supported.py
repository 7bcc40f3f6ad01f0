"""The check before the installation names what is missing in one line, on a Python that cannot run the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gpt.supported import PYTHON, problem

ROOT = Path(__file__).parent.parent
FILE = "mlx_gpt/supported.py"


@pytest.mark.parametrize(
    ("version", "system", "machine", "macos", "words"),
    [
        ((3, 9, 6), "Darwin", "arm64", "15.1", "needs Python 3.10 or newer, and this is 3.9; a newer one: uv venv -p"),
        ((3, 12, 0), "Darwin", "x86_64", "15.1", "needs Apple silicon, and this Python is for x86_64"),
        ((3, 12, 0), "Darwin", "arm64", "13.6", "needs macOS 14 or newer, and this is 13.6"),
        ((3, 12, 0), "Windows", "AMD64", "", "runs on macOS and Linux, not on Windows"),
    ],
)
def test_what_is_missing_is_one_line(
    version: tuple[int, ...], system: str, machine: str, macos: str, words: str
) -> None:
    line = problem(version, system, machine, macos)
    assert line is not None
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_a_supported_machine_has_no_problem(system: str) -> None:
    assert problem((3, 10, 0), system, "arm64", "26.2" if system == "Darwin" else "") is None


def test_the_check_runs_as_a_file_and_is_the_first_command_of_the_readme() -> None:
    run = subprocess.run([sys.executable, FILE], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(line for line in readme.splitlines() if "&&" in line)
    assert first.startswith(f"python3 {FILE} && ")


def test_the_check_has_the_syntax_of_old_pythons_and_the_version_of_the_package() -> None:
    ast.parse((ROOT / FILE).read_text(encoding="utf-8"), feature_version=(3, 7))
    assert f'requires-python = ">={PYTHON[0]}.{PYTHON[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
