"""An error of any command is one line with a remedy, and leaves no files behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import check_error, environment, everything, in_a_process, the_line
from helpers.loopback_hub import NOWHERE, connect, running

from mlx_gpt.cli import main, parse
from mlx_gpt.commands.generate import Generate
from mlx_gpt.terminal import escaped


def nothing(here: Path) -> None:
    pass


def no_config(here: Path) -> None:
    (here / "model/config.json").unlink()


def other_config(here: Path) -> None:
    config = json.loads((here / "model/config.json").read_text())
    (here / "model/config.json").write_text(json.dumps(config | {"n_layer": 3}))


def empty_weights(here: Path) -> None:
    (here / "model/model.safetensors").write_bytes(b"")


def cut_weights(here: Path) -> None:
    file = here / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


GENERATE = ["generate", "./model"]
FEW_TOKENS = [*GENERATE, "--prompt", "a", "--max-tokens", "2", "--no-figures"]

WRONG: list[tuple[Callable[[Path], None], list[str], int, str]] = [
    # Files and data: 1
    (nothing, ["generate", "./nowhere"], 1, "./nowhere: no such folder, and not a hub id"),
    (nothing, ["generate", "text.txt"], 1, "text.txt: expected a model folder or a file of weights"),
    (no_config, GENERATE, 1, "config.json: expected a settings file, but it cannot be read"),
    (other_config, GENERATE, 1, "h.2.ln_1.weight: expected shape (16,), found no such tensor (and 11 more like it)"),
    (empty_weights, GENERATE, 1, "model.safetensors: expected a whole safetensors file, found 0 bytes"),
    (cut_weights, GENERATE, 1, "bytes where its header promises"),
    # Usage: 2
    (nothing, [*GENERATE, "--temperature", "-0.5"], 2, "--temperature must be 0 (greedy) or above, not -0.5"),
    (
        nothing,
        ["generate", "./nowhere", "--top-p", "2"],
        2,
        "--top-p must be above 0 and at most 1",
    ),  # checked before the folder
    (nothing, [*GENERATE, "--top-k", "-1"], 2, "--top-k must be 0 (off) or a number of ids, not -1"),
    (nothing, [*GENERATE, "--max-tokens", "-1"], 2, "--max-tokens must be 0 or above, not -1"),
    (nothing, [*GENERATE, "--seed", "-1"], 2, "--seed must be 0 or above"),
    (
        nothing,
        [*GENERATE, "--prompt", "a" * 32],
        2,
        "32 tokens long and the model's context is 32; shorten it to at most",
    ),
    (nothing, ["quickstart", "--minutes", "0"], 2, "--minutes must be between 0.2 and 1440, not 0"),
    (nothing, ["quickstart", "--minutes", "nan"], 2, "--minutes must be between 0.2 and 1440, not nan"),
    (nothing, ["quickstart", "--seed", "-1"], 2, "--seed must be 0 or above and below 2^64, not -1"),
]


@pytest.mark.parametrize(
    ("prepare", "arguments", "code", "message"), WRONG, ids=lambda part: getattr(part, "__name__", str(part)[:60])
)
def test_an_error_is_one_line_and_leaves_no_files(
    prepare: Callable[[Path], None],
    arguments: list[str],
    code: int,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(here)
    check_error(arguments, code, message, here, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "train, generate, "),
        (["walk"], "walk"),
        (["generate"], "MODEL"),
        ([*GENERATE, "--top", "3"], "--top"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_wrong_flags_are_reported_readably(
    arguments: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(here)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    output = capsys.readouterr()
    assert end.value.code == 2
    assert expected in output.err
    assert "Traceback" not in output.err
    assert "--help" in output.err
    assert not output.out
    assert everything(here) == before


def test_control_characters_of_a_wrong_flag_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["\x1b[2Jx"], [*GENERATE, "\x1b]0;x\x07"], [*GENERATE, "--\x9b2J"]):
        with pytest.raises(SystemExit):
            main(wrong)
        found = capsys.readouterr().err
        assert not {"\x1b", "\x07", "\x9b"} & set(found)
        assert escaped(wrong[-1]) in found
    right = parse(["generate", "m", "--prompt", "\x1b[2Jx"])
    assert isinstance(right, Generate)
    assert right.prompt == "\x1b[2Jx"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (True, "ada/gpt: no such folder here, and from the hub: no such model on the hub; check the spelling"),
        (False, "127.0.0.1:9 cannot be reached … connect to the internet, or give a folder"),
    ],
    ids=["no such model", "no network"],
)
def test_a_model_missing_on_the_hub_is_reported_in_one_line(
    network: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with running() as hub:  # without any model
        connect(hub.address if network else NOWHERE, tmp_path / "hub", monkeypatch)
        assert main(["generate", "ada/gpt"]) == 1
    output = capsys.readouterr()
    assert all(part in the_line(output.err) for part in message.split(" … "))  # … is the operating system's message
    assert not output.out
    assert not [path for path in (tmp_path / "hub").rglob("*.json") if path.is_file()]


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
