"""A failure of the machine or of another library is one line; a bug shows its traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import environment, in_a_process, the_line

from mlx_gpt.cli import main
from mlx_gpt.commands.generate import Generate

GENERATE = ["generate", "./model"]
FEW_TOKENS = [*GENERATE, "--prompt", "a", "--max-tokens", "2", "--no-figures"]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Generate) -> None:
        raise error

    monkeypatch.setattr(Generate, "__call__", fail)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("deep inside"),
        TypeError("deep inside"),
        KeyError("deep inside"),
        AssertionError("deep inside"),
        NotImplementedError("deep inside"),
        SystemExit("deep inside"),
        type("OwnError", (Exception,), {"__module__": "mlx_gpt.serve.request"})("deep inside"),
    ],
    ids=repr,
)
def test_a_bug_shows_its_traceback(error: BaseException, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    with pytest.raises(type(error), match="deep inside"):
        main(GENERATE)


def of_rust(name: str, base: type[BaseException], module: str) -> BaseException:
    return type(name, (base,), {"__module__": module})("deep\x1b[2J\ninside")  # type: ignore[no-any-return]


FAILED = "[METAL] Command buffer execution failed"
LESS = "use a smaller model, batch or context, or --recompute; train --resume RUN continues from the last checkpoint"
OUTSIDE: list[tuple[BaseException, str]] = [
    (
        of_rust("PanicException", BaseException, "pyo3_runtime"),
        r"PanicException: deep\x1b[2J inside; MLX_GPT_TRACEBACK=1",
    ),
    (of_rust("ArrowInvalid", ValueError, "pyarrow.lib"), r"ArrowInvalid: deep\x1b[2J inside; MLX_GPT_TRACEBACK=1"),
    (of_rust("SafetensorError", Exception, "safetensors._safetensors_rust"), "SafetensorError: deep"),
    (Exception("Cannot instantiate"), "Exception: Cannot instantiate; MLX_GPT_TRACEBACK=1 shows where"),
    (
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        f"not enough memory ([malloc] Unable to allocate 9 bytes.); {LESS}",
    ),
    (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), "not enough memory ([metal::malloc]"),
    (
        RuntimeError(f"{FAILED}: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."),
        "not enough memory",
    ),
    (
        RuntimeError(
            f"{FAILED}: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
        ),
        f"the GPU stopped a computation that took too long ({FAILED}: Impacting",
    ),
    (
        RuntimeError(f"{FAILED}: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."),
        "the GPU stopped a computation",
    ),
    (RuntimeError("something of MLX"), "RuntimeError: something of MLX; MLX_GPT_TRACEBACK=1 shows where"),
    (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
    (OverflowError("Python int too large to convert to C long"), "OverflowError: Python int too large"),
    (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), "UnicodeEncodeError: 'utf-8' codec can't"),
    (MemoryError(), f"not enough memory; {LESS}"),
    (OSError(28, "No space left on device"), "the disk: No space left on device"),
    (PermissionError(13, "Permission denied", "a\x1b[2Jb"), r"a\x1b[2Jb: Permission denied"),
    (IsADirectoryError(21, "Is a directory", ".saving-x/m", None, "m"), "m: Is a directory"),
]


@pytest.mark.parametrize(("error", "line"), OUTSIDE, ids=lambda part: type(part).__name__)
def test_a_failure_of_another_library_is_one_line(
    error: BaseException, line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    assert main(GENERATE) == 1
    assert the_line(capsys.readouterr().err).startswith(line)
    monkeypatch.setenv("MLX_GPT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(GENERATE)


@pytest.mark.parametrize("stream", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_not_an_error(stream: int, here: Path) -> None:
    run = in_a_process(*FEW_TOKENS, cwd=here, preexec_fn=lambda: os.close(stream))
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout_is_one_line(here: Path) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "mlx_gpt", *FEW_TOKENS],
            cwd=here,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert the_line(run.stderr) == "the disk: No space left on device"
    assert run.returncode == 1
