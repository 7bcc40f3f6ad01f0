"""A model is found by one set of rules: any layout, as a file or its folder, whatever the names of the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.layout_files import IDS, PLAIN, write_hub, write_llmc, write_mlx_lm, write_sharded, write_tensorflow

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load, save
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer

TEXT = "the sea was calm and the storm came late\n" * 60
EVAL = ("--task", "perplexity", "--data", "t.txt")


def a_model() -> GPT:
    mx.random.seed(0)
    return GPT(GPTConfig(264, 16, 64, 1, 2, initializer_range=0.2))


def write_gguf(folder: Path) -> Path:
    save(a_model(), Tokenizer.train([TEXT], 264), folder)
    export(find_source(folder), folder / "x.gguf", "gguf")
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    return folder / "x.gguf"


def write_quantized(folder: Path) -> Path:
    save(a_model(), Tokenizer.train([TEXT], 264), folder.with_name("floats"))
    convert(find_source(folder.with_name("floats")), folder, bits=4)
    return folder


def beside_its_config(folder: Path) -> Path:
    write_hub(folder, PLAIN)
    return (folder / "model.safetensors").rename(folder / "weights")


def message(path: Path) -> str:
    with pytest.raises(ModelFolderError) as refusal:
        find_source(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "hub": lambda p: write_hub(p, PLAIN),
    "hub, by its weights": lambda p: write_hub(p, PLAIN) / "model.safetensors",
    "hub, by its config": lambda p: write_hub(p, PLAIN) / "config.json",
    "hub, by a shard": lambda p: sorted(write_sharded(p, PLAIN).glob("*-of-*"))[0],
    "hub, weights of another name": beside_its_config,
    "mlx-lm": lambda p: write_mlx_lm(p, PLAIN),
    "llm.c": lambda p: write_llmc(p, PLAIN),
    "TensorFlow": write_tensorflow,
    "TensorFlow, by its index": lambda p: write_tensorflow(p) / "model.ckpt.index",
    "GGUF": write_gguf,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_command_opens_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(TEXT)
    (tmp_path / "m").mkdir()
    model = str(WRITERS[layout](tmp_path / "m"))
    if layout != "GGUF":
        Tokenizer.bytes().save(tmp_path / "m")
    train = ("--steps", "1", "--batch-size", "2", "--learning-rate", "1e-4", "--out", "run")
    for command, *flags in [
        ("generate", model, "--prompt", "the", "--max-tokens", "1"),
        ("eval", model, *EVAL),
        ("verify", model, "--tokens", "4"),
        ("export", model, "out.bin", "--to", "llm.c"),
        ("convert", model, "out"),
        ("train", "--init", model, "--data", "t.txt", *train),
    ]:
        assert main([command, *flags]) == 0, (command, capsys.readouterr().err)


def test_a_quantized_model_generates_and_is_evaluated_and_all_else_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(TEXT)
    write_quantized(tmp_path / "q")
    assert main(["generate", "q", "--prompt", "the", "--max-tokens", "1"]) == 0
    assert main(["eval", "q", *EVAL]) == 0
    capsys.readouterr()
    for command, verb in {
        ("verify", "q"): "verify",
        ("export", "q", "x.bin", "--to", "llm.c"): "export",
        ("convert", "q", "again"): "convert",
        ("train", "--init", "q", "--data", "t.txt", "--out", "run"): "start from",
        ("generate", "q", "--prompt", "the", "--quantize", "4"): "leave out --quantize, or quantize",
    }.items():
        assert main([*command]) == 1
        line = f"mlx-gpt: q: is quantized already, to 4 bits; {verb} the float model that it was made from\n"
        assert capsys.readouterr().err == line


def test_a_config_that_calls_float_weights_quantized_changes_nothing(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "m", PLAIN, quantization={"bits": 4, "group_size": 32})
    assert mx.array_equal(load(folder)[0](IDS), load(write_hub(tmp_path / "n", PLAIN))[0](IDS))


def test_a_file_beside_a_config_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    expected = load(file)[0](IDS[:, :8])
    save(a_model(), Tokenizer.train([TEXT], 264), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file.rename(tmp_path / "ckpt.pt")
    assert mx.array_equal(load(tmp_path)[0](IDS[:, :8]), expected)


@pytest.mark.parametrize("layout", ["llm.c", "GGUF", "hub, weights of another name"])
def test_a_folder_with_one_file_of_weights_means_that_file(tmp_path: Path, layout: str) -> None:
    (tmp_path / "m").mkdir()
    file = WRITERS[layout](tmp_path / "m")
    if layout == "llm.c":
        Tokenizer.bytes().save(tmp_path / "m")
    (tmp_path / "m" / "optimizer.pt").write_bytes(b"PK\3\4")
    plain = file.rename(file.with_name("plain"))  # recognised without a suffix
    assert mx.array_equal(load(tmp_path / "m")[0](IDS[:, :8]), load(plain)[0](IDS[:, :8]))
    shutil.copy(plain, tmp_path / "m" / "other")
    assert "expected one file of weights, found other, plain; give one of them" in message(tmp_path / "m")


def test_of_two_layouts_in_a_folder_safetensors_are_read_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hub(tmp_path / "m", PLAIN)
    find_source(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')  # as mlx-lm writes beside one file
    find_source(folder)
    assert caplog.messages == []
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4")
    assert find_source(folder).kind == "Hugging Face"
    assert caplog.messages == [f"{folder}: reads model.safetensors, not pytorch_model.bin"]


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "base_model_name_or_path": "gpt2"},
        {"fine_tune_type": "lora", "model": "gpt2", "lora_parameters": {"rank": 8}},
    ],
    ids=["PEFT", "mlx-lm"],
)
def test_an_adapter_is_refused_by_name(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").touch()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert "holds an adapter (LoRA) of gpt2, not a model; merge it first" in message(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found an empty file"),
        (b"Once upon a time", "found a file that begins with b'Once upo'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a git-lfs pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "found HDF5"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_content(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "m").write_bytes(content)
    assert found in message(tmp_path / "m")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    assert "found a device or a pipe" in message(tmp_path / "m")


def test_a_folder_without_a_model_names_those_below_it(tmp_path: Path) -> None:
    assert "expected config.json and model.safetensors, found neither; give the folder of a model" in message(tmp_path)
    write_hub(tmp_path / "checkpoints" / "step-2", PLAIN)
    assert f"found neither; give one of {tmp_path / 'checkpoints' / 'step-2'}" in message(tmp_path)


@pytest.mark.parametrize("name", ["", "~no-such-user/m", "a\0b"])
def test_a_name_that_is_no_path_is_refused(name: str) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        find_source(name)


def test_a_missing_tokenizer_is_named_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = write_llmc(tmp_path / "m", PLAIN)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    with pytest.raises(ModelFolderError, match=r"m: expected vocab\.json and merges\.txt"):
        load(file)
