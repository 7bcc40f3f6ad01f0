"""Malicious or damaged files are refused in one line, run no code and take no memory, or give the right logits.

The last part damages folders at random, reproducibly, and compares those that still load with the float64 reference,
which has its own reader.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import SMALL, in_a_process, the_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.layers import max_per_token
from mlx_gpt.check.reference import gpt2
from mlx_gpt.cli import main
from mlx_gpt.errors import MLXGPTError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer

MEMORY = 120_000_000  # bytes that a refusal may take; a JSON header of 3 MB takes most of it
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TINY = replace(SMALL, n_embd=8, n_layer=2, n_positions=8)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mx.random.seed(0)
    model, folder = GPT(TINY), tmp_path_factory.mktemp("valid") / "model"
    weights: Any = tree_flatten(model.parameters())
    model.load_weights([(name, mx.random.normal(weight.shape) * 0.3) for name, weight in weights])  # none is 0 or 1
    save(model, Tokenizer.bytes(), folder)
    return folder


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(valid, tmp_path / "model")


def refusal(folder: Path) -> str:
    """Return the one line with which ``load`` refuses, having taken little memory."""
    tracemalloc.start()
    mx.reset_peak_memory()
    already = mx.get_active_memory()
    try:
        with pytest.raises(MLXGPTError) as error:
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        assert mx.get_peak_memory() - already < 1_000_000
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 3000
    return message


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


# The header of the weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 2**20, 2**32, 2**63 - 1, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(folder: Path, length: int) -> None:
    _, data = header_of(folder)
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data)
    assert "expected a whole safetensors file" in refusal(folder)


def test_a_header_longer_than_any_gpts_is_not_read(folder: Path) -> None:
    header, data = header_of(folder)
    write_header(folder, json.dumps(header).encode() + b" " * 3_000_000, data)
    assert "where a thousand layers take 1500000" in refusal(folder)


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["wpe.weight"].update(changes)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["wpe.weight"].pop(name)


def shifted(by: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["wpe.weight"]["data_offsets"] = [offset + by for offset in header["wpe.weight"]["data_offsets"]]

    return change


HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "overlapping": shifted(-4),
    "past the end": shifted(2**40),
    "before the beginning": shifted(-(2**40)),
    "reversed offsets": entry(data_offsets=[256, 0]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "offsets as text": entry(data_offsets=["0", "256"]),
    "fractional offsets": entry(data_offsets=[0.0, 256.0]),
    "a shape of negative numbers": entry(shape=[-8, -8]),
    "a shape beyond 64 bits": entry(shape=[2**33, 2**33]),
    "a shape beyond 32 bits": entry(shape=[2**32, 0]),
    "a shape of fractions": entry(shape=[8.0, 8]),
    "a shape of booleans": entry(shape=[True, 64]),
    "a shape of lists": entry(shape=[[8], 8]),
    "a shape as text": entry(shape="88"),
    "no shape": without("shape"),
    "no dtype": without("dtype"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "an unknown dtype": entry(dtype="F33\nINJECTED"),
    "metadata that is a list": lambda header: header.update(__metadata__=[1, 2]),
    "metadata that is not text": lambda header: header.update(__metadata__={"format": {"pt": 1}}),
    "a tensor that is a number": lambda header: header.update({"wpe.weight": 5}),
    "a name with control characters": lambda header: header.update({"\x1b[2J\n": header.pop("wpe.weight")}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_the_file_is_refused(folder: Path, case: str) -> None:
    header, data = header_of(folder)
    HEADERS[case](header)
    write_header(folder, header, data)
    refusal(folder)


@pytest.mark.parametrize("shape", [[64], [1, 8, 8], [8, 8, 1], [4, 16]], ids=str)
def test_a_tensor_of_another_rank_or_shape_is_refused_by_its_name(folder: Path, shape: list[int]) -> None:
    header, data = header_of(folder)
    header["wpe.weight"]["shape"] = shape
    write_header(folder, header, data)
    assert f"wpe.weight: expected shape (8, 8), found {tuple(shape)}" in refusal(folder)


def test_a_duplicate_tensor_is_refused(folder: Path) -> None:
    header, data = header_of(folder)
    text = json.dumps(header)
    write_header(folder, (text[:-1] + ', "wpe.weight": ' + json.dumps(header["wpe.weight"]) + "}").encode(), data)
    assert "expected a whole safetensors file" in refusal(folder)


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_proj.bias"])
def test_weights_with_nan_or_infinity_are_refused_by_name(
    folder: Path, name: str, value: float, dtype: mx.Dtype
) -> None:
    weights = {key: weight.astype(dtype) for key, weight in mx.load(str(folder / WEIGHTS)).items()}
    spoilt = np.array(weights[name].astype(mx.float32))
    spoilt.reshape(-1)[-1] = value
    weights[name] = mx.array(spoilt).astype(dtype)
    mx.eval(weights)
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    assert f"{name}: expected numbers, found NaN or infinity as mlx.core.float32" in refusal(folder)
    with pytest.raises(MLXGPTError, match=r"found NaN or infinity as .*bfloat16"):
        load(folder, dtype=mx.bfloat16)


def test_the_largest_finite_numbers_are_accepted(folder: Path) -> None:
    weights = dict(mx.load(str(folder / WEIGHTS)))
    weights["wpe.weight"] = mx.full((8, 8), -3.38e38)
    mx.eval(weights)
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    for dtype in (mx.float32, mx.bfloat16):
        assert load(folder, dtype=dtype)[0].wpe.weight.min().item() < -3e38
    with pytest.raises(MLXGPTError, match=r"found NaN or infinity as .*float16"):
        load(folder, dtype=mx.float16)


# config.json --------------------------------------------------------------------------------------------------------


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"n_layer": 10**9}, "n_layer is 1000000000, but there are 28 tensors in all"),
    "a thousand layers": ({"n_layer": 1000}, "h.2.ln_1.weight: expected shape (8,), found no such tensor"),
    "a vocabulary of 10^12": ({"vocab_size": 10**12}, "vocab_size must be an integer of at least 1 and below 2^31"),
    "10^15 positions": (
        {"n_positions": 10**15, "n_ctx": 10**15},
        "n_positions must be an integer of at least 1 and below 2^31",
    ),
    "a width of 10^18": ({"n_embd": 10**18, "n_inner": 16}, "n_embd must be an integer of at least 1 and below 2^31"),
    "an MLP of 10^12": ({"n_inner": 10**12}, "n_inner must be an integer of at least 1 and below 2^31"),
    "a billion heads": ({"n_head": 10**9}, "n_embd must be a multiple of n_head"),
    "a number of 5000 digits": ({"n_layer": "10**5000"}, "config.json: expected JSON, found something else"),
    "an epsilon of infinity": ({"layer_norm_epsilon": np.inf}, "layer_norm_epsilon must be a number above 0"),
    "an epsilon of 10^400": ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon must be a number above 0"),
    "no epsilon": ({"layer_norm_epsilon": np.nan}, "layer_norm_epsilon must be a number above 0, not nan"),
    "a setting with control characters": ({"\x1b[31m\nred": 1}, "\\x1b[31m red is no setting of GPT-2, found 1"),
    "a very long setting": ({"x" * 1_000_000: 1}, "x is no setting of GPT-2"),
    "a very long value": ({"bias": ["x"] * 100_000}, "bias is no setting of GPT-2"),
    "a list for a number": ({"n_layer": [2]}, "n_layer must be an integer of at least 1"),
    "a dict for a name": ({"activation_function": {"a": 1}}, "activation_function must be one of"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_allocated(folder: Path, case: str) -> None:
    change, message = CONFIGS[case]
    text = json.dumps(json.loads((folder / CONFIG).read_text()) | change)
    (folder / CONFIG).write_text(text.replace('"10**5000"', "1" + "0" * 5000))
    assert message in refusal(folder)


# JSON -----------------------------------------------------------------------------------------------------------------


DEEP = "[" * 100_000 + "]" * 100_000
JSON_FILES = [CONFIG, "vocab.json", "tokenizer.json", "added_tokens.json", INDEX, WEIGHTS]


def put(folder: Path, name: str, text: str) -> None:
    if name == WEIGHTS:
        write_header(folder, text.encode(), b"")
        return
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, '{"a": 1, "a": 2}', "9" * 10_000, "null", '"'], ids=range(6))
def test_invalid_or_too_deeply_nested_json_is_refused(folder: Path, name: str, text: str) -> None:
    put(folder, name, text)
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, "vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", INDEX])
def test_an_endless_file_is_not_read(folder: Path, name: str) -> None:
    put(folder, name, "")
    os.truncate(folder / name, 2**40)  # a sparse file
    assert "more than" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "not a file but a device or a pipe" in refusal(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a file but a device or a pipe" in refusal(folder)


def test_weights_that_are_not_a_file_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert "expected weights, found a pipe" in refusal(folder)
    for target, message in (
        ("/dev/zero", "expected a whole"),
        (folder / WEIGHTS, "cannot be read"),
        (folder, "Is a dir"),
    ):
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(target)
        assert message in refusal(folder) or target == folder / WEIGHTS  # a link to itself does not exist


# The index of shards -----------------------------------------------------------------------------------------------


ELSEWHERE = [
    "../model/x.safetensors",
    "/dev/zero",
    "a/b.safetensors",
    "..",
    ".",
    "",
    "a\0b",
    "C:\\x",
    "\ud800",
    ".hidden",
]


@pytest.mark.parametrize("name", [*ELSEWHERE, 5, None, ["x"]], ids=repr)
def test_an_index_cannot_name_a_file_in_another_folder(folder: Path, name: Any) -> None:
    (folder / WEIGHTS).rename(folder / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    assert "expected a weight_map of tensors to files beside it" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {}, {"wte.weight": "x" * 5000}], ids=lambda value: str(value)[:40]
)
def test_an_index_without_shards_is_refused(folder: Path, weight_map: Any) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refusal(folder)


# The tokenizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "added",
    [{"": 257}, {"\ud800": 257}, {"<x>": -1}, {"<x>": 1.0}, {"<x>": True}, {"<x>": 10**12}, {"<x>": "257"}, {"<x>": 0}],
    ids=repr,
)
def test_an_invalid_token_is_refused(folder: Path, added: dict[str, Any]) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(added))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as in old folders, where the file counts
        (folder / name).unlink()
    assert "added_tokens.json: " in refusal(folder)


# Pickles ------------------------------------------------------------------------------------------------------------


class Harm:
    """An object whose pickle creates a folder when it is opened."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS, "ckpt.pt", CONFIG, "vocab.json", "model.ckpt.index"])
def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    if name in ("pytorch_model.bin", "ckpt.pt", "model.ckpt.index"):
        (folder / WEIGHTS).unlink()
    if name in ("ckpt.pt", "model.ckpt.index"):
        (folder / CONFIG).unlink()
    if name == "model.ckpt.index":
        sizes = {"n_vocab": 257, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 2}
        (folder / "hparams.json").write_text(json.dumps(sizes))
    (folder / name).write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    refusal(folder)
    assert not (tmp_path / "harm").exists()
    pickle.loads((folder / ("vocab.json" if name == "vocab.json" else name)).read_bytes())  # opened naively, it would
    assert (tmp_path / "harm").exists()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_code_in_a_pickle_is_not_run_by_convert(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    (folder / WEIGHTS).unlink()
    if name == "ckpt.pt":
        (folder / CONFIG).unlink()
    (folder / name).write_bytes(pickle.dumps({"wte.weight": Harm(tmp_path / "harm")}))
    assert main(["convert", str(folder), str(tmp_path / "dest")]) == 1
    assert "no code in it was run" in the_line(capsys.readouterr().err)
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "dest").exists()


@pytest.mark.parity
def test_a_pickled_tensor_that_is_larger_than_its_file_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    (folder / WEIGHTS).unlink()
    view = torch.zeros(1).expand(10**13)
    torch.save({"wpe.weight": view}, folder / "pytorch_model.bin")
    assert main(["convert", str(folder), str(tmp_path / "dest")]) == 1
    assert "wpe.weight: 40000000000000 bytes in a file of" in the_line(capsys.readouterr().err)


def test_the_command_prints_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / CONFIG).write_text(DEEP)
    for verb in (["generate"], ["verify"], ["eval", "--task", "lambada", "--data", str(folder / CONFIG)]):
        assert main([*verb, str(folder)]) == 1
        assert "config.json: expected JSON" in the_line(capsys.readouterr().err)
    run = in_a_process("generate", str(folder), cwd=tmp_path)
    assert run.returncode == 1
    assert "config.json: expected JSON" in the_line(run.stderr)


# Random damage ------------------------------------------------------------------------------------------------------


Files = dict[str, bytes]
KINDS: dict[str, Files] = {}  # valid folders: whole, in shards, and with a fast tokenizer only


@pytest.fixture
def _kinds(valid: Path, tmp_path: Path) -> None:
    KINDS["whole"] = {file.name: file.read_bytes() for file in valid.iterdir() if file.name != "tokenizer_config.json"}
    weights = mx.load(str(valid / WEIGHTS))
    homes = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    KINDS["sharded"] = {name: content for name, content in KINDS["whole"].items() if name != WEIGHTS}
    for shard in set(homes.values()):
        mx.save_safetensors(str(tmp_path / shard), {name: weights[name] for name in homes if homes[name] == shard})
        KINDS["sharded"][shard] = (tmp_path / shard).read_bytes()
    KINDS["sharded"][INDEX] = json.dumps({"metadata": {}, "weight_map": homes}).encode()
    KINDS["fast"] = {name: c for name, c in KINDS["whole"].items() if name not in ("vocab.json", "merges.txt")}


HOW = ["flip", "cut", "insert", "remove", "digit", "tensor", "swap"]


def damage(files: Files, how: str, random: np.random.Generator) -> None:
    in_header = how in ("tensor", "swap")
    names = sorted(name for name in files if name.endswith(".safetensors") or not in_header)
    name = names[random.integers(len(names))]
    content = bytearray(files[name])
    is_weights = name.endswith(".safetensors")
    end = 8 + int.from_bytes(content[:8], "little") if is_weights else len(content)  # of the part to damage
    at = int(random.integers(end))
    if how == "flip":
        content[at] ^= 1 << int(random.integers(8))
    elif how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = random.choice([b"\0", b"9", b"-", b'"', b"}", b"\xff" * 4, b"0" * 30]).item()
    elif how == "remove":
        del content[at : at + int(random.integers(1, 5))]
    elif how == "digit" and (digits := [i for i in range(end) if content[i] in b"0123456789"]):
        content[digits[random.integers(len(digits))]] = ord(str(random.integers(10)))
    elif is_weights:
        content = change_header(content, how, random)
    files[name] = bytes(content)


def change_header(content: bytearray, how: str, random: np.random.Generator) -> bytearray:
    """Drop, rename, reshape, recast or swap tensors in the header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = (names[i] for i in random.integers(len(names), size=2))
    change = "swap" if how == "swap" else random.choice(["drop", "rename", "reshape", "dtype"])
    if change == "swap":
        header[one], header[other] = header[other], header[one]
    elif change == "drop":
        del header[one]
    elif change == "rename":
        header[random.choice([other, "transformer." + one, one + "x", "h.7." + one, ""])] = header.pop(one)
    elif change == "reshape":
        header[one]["shape"] = random.choice([[1], [0], [-1], [2**31], [2**62]]).tolist() + header[one]["shape"]
    else:
        header[one]["dtype"] = random.choice(["F16", "BF16", "I32", "F64", "U8", "BOOL"])
    text = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text) + content[8 + length :]


@pytest.mark.usefixtures("_kinds")
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["whole", "sharded", "fast"]), st.sampled_from(HOW), st.integers(0, 2**32 - 1))
def test_a_damaged_folder_is_refused_in_one_line_or_gives_the_right_numbers(kind: str, how: str, seed: int) -> None:
    loads_right(kind, how, seed)


@pytest.mark.usefixtures("_kinds")
def test_the_damage_is_neither_always_fatal_nor_always_harmless() -> None:
    loaded = [loads_right(kind, how, seed) for kind in KINDS for how in HOW for seed in range(4)]
    assert 0.05 < sum(loaded) / len(loaded) < 0.6


def loads_right(kind: str, how: str, seed: int) -> bool:
    """Return True if a damaged folder still loads; then its logits must be right."""
    files = dict(KINDS[kind])
    damage(files, how, np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            model, tokenizer = load(folder)
        except MLXGPTError as error:
            line = str(error)
        else:
            compare(model, tokenizer, Path(folder))
            return True
    assert line.isprintable()
    return False


def compare(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare all logits with the reference, and check that the tokenizer round-trips a text."""
    ids = np.arange(model.config.n_positions) % model.config.vocab_size
    expected = gpt2(HubFolder(folder), ids)
    off = max_per_token(np.array(model(ids[None])[0]) - expected) / max_per_token(expected)
    assert off.max() < 1e-5
    text = "It’s a text, 12 of it.\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded) == text
    assert max(encoded) < model.config.vocab_size
