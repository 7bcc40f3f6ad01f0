"""Run the command line, read its error line, and snapshot the files it leaves."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.terminal import COMPILING

ROOT = Path(__file__).parents[2]
SMALL = GPTConfig(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
TINY = shlex.split("--tokenizer bytes --n-positions 16 --n-embd 16 --n-layer 1 --n-head 2 --batch-size 2")
TEXT = "".join(f"line {i} of a text\n" for i in range(100))
TRAIN = ["train", "--data", "text.txt", "--out", "run", *TINY, "--steps", "2"]


def everything(folder: Path) -> dict[str, bytes]:
    """Return the files and folders below a folder with their contents, except the cache."""
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "cache"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def in_a_process(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``mlx-gpt`` in a process, with ``environment(**env)``; its stderr does not report a first compilation."""
    run = subprocess.run(
        [sys.executable, "-m", "mlx_gpt", *arguments],
        cwd=cwd,
        env=environment(**options.pop("env", {})),
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )
    run.stderr = run.stderr.replace(f"mlx-gpt: {COMPILING}\n", "")
    return run


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without its settings of the hub, with the package on the path."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    return own | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


def the_line(stderr: str) -> str:
    """Return the only line of stderr, without its ``mlx-gpt: ``."""
    assert "Traceback" not in stderr
    (line,) = stderr.splitlines()
    assert line.startswith("mlx-gpt: ")
    return line.removeprefix("mlx-gpt: ")


def check_error(
    arguments: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Assert that ``mlx-gpt`` ends with this code and one line with this message, and changes nothing in a folder."""
    before = everything(folder)
    assert main(arguments) == code
    assert message in the_line(capsys.readouterr().err)
    assert everything(folder) == before
