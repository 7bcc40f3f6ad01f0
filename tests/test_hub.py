"""Models are downloaded from the hub: only the needed files, resumed, cached; failures are one line.

All tests use the real client with a local server, in separate processes where one process would not do.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.command_line import SMALL, environment, in_a_process, the_line
from helpers.loopback_hub import NOWHERE, Hub, connect, running

from mlx_gpt.cli import main
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.store.locate import download
from mlx_gpt.text.tokenizer import Tokenizer

UNNEEDED = ("pytorch_model.bin", "tf_model.h5", "onnx/decoder_model.onnx", "64.tflite", "README.md")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Run a hub with one valid model, ada/tiny, in two versions, and with unneeded files."""
    versions = []
    for seed in (0, 1):
        mx.random.seed(seed)
        folder = tmp_path / f"version-{seed}"
        save(GPT(replace(SMALL, n_embd=32)), Tokenizer.bytes(), folder)
        for name in UNNEEDED:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x" * 100)
        versions.append(folder)
    with running() as hub:
        hub.add("ada/tiny", *versions)
        yield hub


CLIENT = """
import json, sys
from huggingface_hub import constants
from mlx_gpt import load
from mlx_gpt.errors import ModelFolderError
constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that small files come in chunks too
for name, revision in json.loads(sys.argv[1]):
    try:
        model, tokenizer = load(name, revision)
        print(f"loaded {model.wte.weight.sum().item():.4f} {tokenizer.vocab_size}")
    except ModelFolderError as error:
        print(error)
"""


def client(cache: Path, endpoint: str, *wanted: tuple[str, str | None], **more: str) -> subprocess.Popen[str]:
    """Start a process that loads each (name, revision) from the hub at ``endpoint``."""
    own = environment(HF_ENDPOINT=endpoint, HF_HOME=str(cache), no_proxy="127.0.0.1", **more)
    command = [sys.executable, "-c", CLIENT, json.dumps(wanted)]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def load_in_a_process(cache: Path, endpoint: str, *wanted: tuple[str, str | None], **more: str) -> list[str]:
    """Return the result of ``load`` in another process for each, one line each, and no other output."""
    process = client(cache, endpoint, *wanted, **more)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == len(wanted), out
    return lines


Loads = Callable[..., list[str]]


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Loads:
    """``load_in_a_process`` in this process, with its cache in ``tmp_path``."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    def one(name: str, revision: str | None) -> str:
        try:
            model, tokenizer = load(name, revision)
        except ModelFolderError as error:
            return str(error)
        return f"loaded {model.wte.weight.sum().item():.4f} {tokenizer.vocab_size}"

    def load_each(endpoint: str, *wanted: tuple[str, str | None], offline: bool = False) -> list[str]:
        connect(endpoint, tmp_path, monkeypatch, offline)
        lines = [one(*each) for each in wanted]
        assert capfd.readouterr() == ("", "")
        return lines

    return load_each


def loaded(hub: Hub, revision: str = "main") -> str:
    model, _ = load(hub.repositories["ada/tiny"][revision])
    return f"loaded {model.wte.weight.sum().item():.4f} 257"


def spans(hub: Hub) -> list[str]:
    """Return the requested ranges of the weights: all, or the first byte."""
    asked = [line.split() for line in hub.requests if line.startswith("GET") and "/model.safetensors" in line]
    return [line[2] if len(line) > 2 else "all" for line in asked]


def test_a_model_is_downloaded_once_and_then_loads_without_the_hub(hub: Hub, loads: Loads, tmp_path: Path) -> None:
    first = f"{0:040x}"
    assert load_in_a_process(tmp_path, hub.address, ("ada/tiny", None), ("ada/tiny", None)) == [loaded(hub)] * 2
    needed = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(hub.served()) == sorted(needed)
    assert load_in_a_process(tmp_path, NOWHERE, ("ada/tiny", None), ("ada/tiny", "main")) == [loaded(hub)] * 2
    assert load_in_a_process(tmp_path, hub.address, ("ada/tiny", None), HF_HUB_OFFLINE="1") == [loaded(hub)]
    assert loads(hub.address, ("ada/tiny", "v0"), ("ada/tiny", first)) == [loaded(hub, "v0")] * 2
    assert loaded(hub, "v0") != loaded(hub)


def test_every_refusal_of_the_hub_is_reported_in_one_line(hub: Hub, loads: Loads, tmp_path: Path) -> None:
    for name in ("gated", "shut", "broken", "holey"):
        hub.add(f"ada/{name}", hub.repositories["ada/tiny"]["main"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").touch()
    hub.add("ada/bare", tmp_path / "bare")
    hub.refusals["ada/gated"] = 403, {"X-Error-Code": "GatedRepo"}
    hub.refusals["ada/shut"] = 403, {"X-Error-Message": "Access to this resource is disabled."}
    hub.refusals["ada/busy"] = 503, {}
    hub.refusals["ada/much"] = 429, {"Retry-After": "0"}
    hub.refusals["ada/private"] = 401, {"X-Error-Message": "Invalid username or password."}
    hub.refusals["ada/broken/model.safetensors"] = 403, {}
    hub.refusals["ada/holey/config.json"] = 403, {}
    cases = {
        ("ada/unknown", None): "ada/unknown: no such folder here, and from the hub: no such model on the hub; check",
        ("gtp2", None): "gtp2: no such folder here, and from the hub: no such model on the hub; check the spelling",
        ("ada/gated", None): f"access must be requested: accept the terms at {hub.address}/ada/gated",
        ("ada/shut", None): "the hub has disabled this model; use another source",
        ("ada/tiny", "v9"): "the hub has it, but no revision 'v9'",
        ("ada/busy", None): "the hub answered with status 503; try again later",
        ("ada/much", None): "the hub answered with status 429; try again later",
        ("ada/private", None): "the hub answered with status 401; check the spelling, or run `hf auth login`",
        ("ada/broken", None): "the hub answered with status 403",
        ("ada/holey", None): "the hub answered with status 403",
        ("ada/bare", None): "ada/bare: the hub has it, but without a config.json",
        ("ada/..x", None): "no such folder, and not a hub id either",
        ("ada/x--y", None): "the hub does not allow such an id",
    }
    for line, expected in zip(loads(hub.address, *cases), cases.values(), strict=True):
        assert expected in line


def test_without_a_network_and_a_cache_the_error_names_the_remedy(loads: Loads) -> None:
    (line,) = loads(NOWHERE, ("ada/tiny", None))
    start, _, end = line.partition(" (ConnectError")
    assert (
        start
        == f"ada/tiny: no such folder here, and from the hub: it is not in the cache, and {NOWHERE} cannot be reached"
    )
    assert end.endswith("); connect to the internet, or give a folder")
    (line,) = loads(NOWHERE, ("ada/tiny", None), offline=True)
    assert "it is not in the cache, and HF_HUB_OFFLINE forbids access to the hub; unset it" in line


def test_a_pickle_is_downloaded_only_if_there_are_no_safetensors_and_torch_opens_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hub.address, tmp_path, monkeypatch)
    (hub.repositories["ada/tiny"]["main"] / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelFolderError, match=r"ada/tiny/pytorch_model\.bin: a PyTorch pickle, which takes torch"):
        download("ada/tiny")
    assert "pytorch_model.bin" not in hub.served()
    monkeypatch.setattr("mlx_gpt.store.locate.import_torch", lambda file: None)
    assert (download("ada/tiny") / "pytorch_model.bin").read_bytes() == b"x" * 100


def test_an_adapter_on_the_hub_is_refused_by_name(hub: Hub, loads: Loads) -> None:
    folder = hub.repositories["ada/tiny"]["main"]
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    (line,) = loads(hub.address, ("ada/tiny", None))
    assert "holds an adapter (LoRA) of gpt2, not a model; merge it first" in line


# Partial downloads


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_lost_connection_is_resumed(hub: Hub, loads: Loads, knows_ranges: bool) -> None:
    hub.cut_after, hub.supports_ranges = [20_000], knows_ranges  # without ranges, the whole file is sent again
    assert loads(hub.address, ("ada/tiny", None)) == [loaded(hub)]
    assert spans(hub) == ["all", "bytes=20000-"]


def test_a_killed_download_is_resumed_by_the_next_process(hub: Hub, loads: Loads, tmp_path: Path) -> None:
    part = killed_halfway(hub, tmp_path)
    size = part.stat().st_size
    assert loads(hub.address, ("ada/tiny", None)) == [loaded(hub)]
    assert spans(hub) == ["all", f"bytes={size}-"]
    assert not part.exists()


def killed_halfway(hub: Hub, cache: Path) -> Path:
    """Kill a download half-way and return the partial file of the weights."""
    hub.cut_after, hub.stalls = [20_000], True
    process = client(cache, hub.address, ("ada/tiny", None))
    part = wait_for_a_part(cache, 10_000)
    process.kill()
    process.communicate()
    return part


def wait_for_a_part(cache: Path, size: int) -> Path:
    for _ in range(600):
        for part in cache.rglob("*.incomplete"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.05)
    raise AssertionError("nothing came")


def test_a_partial_download_is_not_used_as_a_model_offline(hub: Hub, loads: Loads, tmp_path: Path) -> None:
    killed_halfway(hub, tmp_path)
    (line,) = loads(NOWHERE, ("ada/tiny", None))
    assert "it is not in the cache" in line


def test_bytes_with_another_sha256_than_announced_are_discarded(hub: Hub, loads: Loads, tmp_path: Path) -> None:
    hub.corrupts = True
    (line,) = loads(hub.address, ("ada/tiny", None))
    assert "from the hub: model.safetensors is damaged: expected sha256" in line
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.corrupts = False
    assert loads(hub.address, ("ada/tiny", None)) == [loaded(hub)]


def test_two_processes_download_the_same_file_once(hub: Hub, tmp_path: Path) -> None:
    processes = [client(tmp_path, hub.address, ("ada/tiny", None)) for _ in range(2)]
    assert [process.communicate(timeout=100)[0].strip() for process in processes] == [loaded(hub)] * 2
    assert spans(hub) == ["all"]


# The command


def on_a_terminal(*arguments: str, cwd: Path, env: dict[str, str]) -> tuple[str, str]:
    """Run a command with stderr on a terminal; return stdout and stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    command = [sys.executable, "-m", "mlx_gpt", *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1000):
            shown += piece
    except OSError:  # Linux: no writer is left
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, shown
    return out.decode(), shown.decode()


def test_a_terminal_sees_a_progress_bar_and_stdout_only_the_text(hub: Hub, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    arguments = ["generate", "ada/tiny", "--max-tokens", "4", "--temperature", "0"]
    first, shown = on_a_terminal(*arguments, cwd=tmp_path, env=env)
    assert "model.safetensors: 100%" in shown
    again = in_a_process(*arguments, cwd=tmp_path, env=env | {"HF_ENDPOINT": NOWHERE})
    assert again.stdout == first
    assert "safetensors" not in again.stderr


def test_ctrl_c_in_a_download_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after, hub.stalls = [20_000], True
    env = environment(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path), no_proxy="127.0.0.1")
    command = [sys.executable, "-m", "mlx_gpt", "generate", "ada/tiny"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    wait_for_a_part(tmp_path, 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert the_line(err.strip()) == "stopped"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "ada/tiny", "--max-tokens", "2"],
        ["verify", "ada/tiny", "--tokens", "2"],
        ["eval", "ada/tiny", "--task", "perplexity", "--data", "text.txt"],
        ["train", "--data", "text.txt", "--out", "run", "--init", "ada/tiny", "--steps", "1"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_takes_a_hub_id_takes_a_revision(
    hub: Hub, here: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect(hub.address, here, monkeypatch)
    assert main([*command, "--revision", "v9"]) == 1
    line = the_line(capsys.readouterr().err.strip())
    assert line.startswith("ada/tiny: no such folder here, and from the hub: the hub has it, but no revision 'v9'")
    assert hub.served() == []


def test_a_revision_of_nothing_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "text.txt", "--out", "run", "--revision", "v9"]) == 2
    assert the_line(capsys.readouterr().err.strip()) == "--revision is of the model that --init names: give --init too"
