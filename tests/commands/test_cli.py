"""The command line: its flags and streams, and what it does at its start."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.command_line import ROOT, check_error, environment, in_a_process

from mlx_gpt import cli
from mlx_gpt.cli import main, parse
from mlx_gpt.commands.generate import Generate
from mlx_gpt.commands.quickstart import Quickstart
from mlx_gpt.generate.generation import generate
from mlx_gpt.generate.settings import Drawing
from mlx_gpt.store.folder import load

GENERATE = ["generate", "./model"]


def test_stdout_holds_only_the_continuation(here: Path) -> None:
    model, tokenizer = load(here / "model")
    text = "".join(generate(model, tokenizer, "The", max_tokens=12, temperature=1.0, top_k=50, seed=3))
    flags = shlex.split("--prompt The --max-tokens 12 --temperature 1 --top-k 50 --seed 3 --no-figures")
    run = in_a_process("generate", "model", *flags, cwd=here, encoding="utf-8")
    assert run.stdout == text + "\n"
    assert run.stderr == ""
    assert run.returncode == 0


def test_a_closed_stdout_is_not_an_error(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # as after `| head -1`, before the first token
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_gpt", *GENERATE],
        cwd=here,
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(write)
        assert process.communicate(timeout=100)[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_flags_set_the_fields_of_a_command() -> None:
    assert parse(["generate", "m", "--top-k", "3"]) == Generate("m", drawing=Drawing(top_k=3))
    assert parse(["quickstart"]) == Quickstart()


# Startup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "talk", "serve", "verify", "eval", "lens", "doctor", "train"])
def test_only_training_computes_products_in_less_than_float32(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    source = {"train": ["--data", "/nowhere"], "eval": ["/nowhere", "--task", "perplexity"]}.get(verb, ["/nowhere"])
    assert main([verb, *source]) != 0
    assert os.environ.get("MLX_ENABLE_TF32") == (None if verb == "train" else "0")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out in (f"mlx-gpt {version('mlx-gpt')}\n", "mlx-gpt (not installed)\n")


def test_help_is_fast_and_imports_no_heavy_package(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlx_gpt", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0
    assert "quickstart" in run.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of CPU time
    assert seconds < 2  # measured: 0.3
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "mlx_gpt" in modules
    assert not modules & {"matplotlib", "tokenizers", "huggingface_hub", "tiktoken", "torch", "transformers"}


def test_the_installed_command_calls_main() -> None:
    assert 'mlx-gpt = "mlx_gpt.cli:main"' in (ROOT / "pyproject.toml").read_text()
    assert cli.main is main


def test_a_variable_sets_the_device_of_a_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, generate = mx.default_device(), ["generate", "model", "--prompt", "a", "--max-tokens", "1"]
    try:
        monkeypatch.setenv("MLX_GPT_DEVICE", "cpu")
        assert main(generate) == 0
        assert mx.default_device() == mx.Device(mx.cpu)
    finally:
        mx.set_default_device(before)
    capsys.readouterr()
    monkeypatch.setenv("MLX_GPT_DEVICE", "tpu")
    check_error(generate, 2, "MLX_GPT_DEVICE must be cpu or gpu, not 'tpu'", here, capsys)
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        monkeypatch.setenv("MLX_GPT_DEVICE", "gpu")
        check_error(generate, 2, "MLX_GPT_DEVICE=gpu: MLX finds no GPU here", here, capsys)
