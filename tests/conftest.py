"""Settings that must stand before MLX is imported, and a folder to work in."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # products in full fp32 on M5 and CUDA too: tolerances here are fp32's
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")  # as mlx-gpt train has it: MLX reads it once
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's idle threads spin on the cores of the other workers

import fcntl
import shutil
import signal
import sys
from math import inf
from pathlib import Path
from typing import Any

import mlx_gpt  # noqa: F401  # isort: skip  # before MLX, so that it multiplies with OpenBLAS, as the command does
import mlx.core as mx
import pytest
from helpers.as_metal import answer_as_metal
from helpers.command_line import SMALL, TEXT
from helpers.derivations import Step, derive

from mlx_gpt.device import choose_device, on_cpu
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld.stories import Parse, generate_stories, parse_story

if sys.platform.startswith("linux"):
    from mlx_gpt.linux_cpu import kernel_folder

    kernel_folder.SLOW = inf  # a first compilation in a test's process is not reported
NOT_ON_A_GPU = {
    "cpu": "for a CPU as the default device",
    "freed_at_once": "a GPU frees memory when a whole buffer of commands is done",
}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, which tests press
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup ignores this one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--as-metal", action="store_true", help="let MLX answer as on an Apple GPU (tests/helpers/as_metal.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        choose_device()  # of MLX_GPT_DEVICE, which the commands in processes read too
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    if config.getoption("as_metal"):
        answer_as_metal()
    flush_nothing()


def flush_nothing() -> None:
    """Let files in this process survive its end but no loss of power: flushing takes longer than a small save."""
    control = fcntl.fcntl

    def without_flush(descriptor: Any, command: int, argument: Any = 0) -> Any:
        return 0 if command == getattr(fcntl, "F_FULLFSYNC", None) else control(descriptor, command, argument)

    os.fsync, fcntl.fcntl = lambda descriptor: None, without_flush


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: gzip's hold the time, and the workers of pytest-xdist must agree on the names."""
    return argname if isinstance(val, bytes) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, reason in NOT_ON_A_GPU.items():
        if item.get_closest_marker(name) and not on_cpu():
            pytest.skip(reason)


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """Ten thousand stories of tinyworld."""
    return generate_stories(10_000, seed=0)


@pytest.fixture(scope="session")
def parses(stories: list[str]) -> list[Parse]:
    return [parse_story(text) for text in stories]


@pytest.fixture(scope="session")
def derivations(stories: list[str]) -> list[list[Step]]:
    """The rules and words of the first three thousand stories."""
    return [list(derive(text)) for text in stories[:3000]]


@pytest.fixture(autouse=True)
def path_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take folders off ``sys.path`` that a test puts there, as the doctor does for a user's file."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    mx.random.seed(0)
    save(GPT(SMALL), Tokenizer.bytes(), folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, sound_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a sound model and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mx.random.seed(0)
    shutil.copytree(sound_model, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path
