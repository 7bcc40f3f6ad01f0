"""GGUF files of GPT-2 compute what their tensors mean, with their own tokenizer; others are refused in one line."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.layout_files import IDS, SETTINGS, TOLERANCE, WIDE, C, H, L, T, linear, rounded, write_hub

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.cli import main
from mlx_gpt.errors import MLXGPTError, ModelFolderError
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load
from mlx_gpt.store.gguf import TYPES, read_gguf
from mlx_gpt.store.gguf_write import architecture, gguf_name, vocabulary
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat and the hat sat on the mat"] * 3, 265)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_hub(tmp_path / "hub", WIDE, vocab_size=384)
    TOKENIZER.save(tmp_path / "hub")
    export(find_source(tmp_path / "hub"), tmp_path / "x.gguf", "gguf")
    return tmp_path / "x.gguf"


def off(path: Path, weights: dict[str, np.ndarray]) -> float:
    return float(np.abs(np.array(load(path)[0](IDS)) - gpt2(HubWeights(weights, SETTINGS), IDS)).max())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_an_exported_gguf_reads_back_as_it_was(file: Path, tmp_path: Path, dtype: mx.Dtype) -> None:
    export(find_source(tmp_path / "hub"), tmp_path / "half.gguf", "gguf", dtype)
    whole = rounded(WIDE, "F16")
    right = {
        name: w if w.ndim == 1 or "wpe" in name or dtype == mx.float32 else whole[name] for name, w in WIDE.items()
    }
    assert off(tmp_path / "half.gguf", right) < TOLERANCE
    model, tokenizer = load(tmp_path / "half.gguf")
    assert model.config == load(tmp_path / "hub")[0].config
    assert tokenizer.hash == TOKENIZER.hash  # no file beside it has one
    export(find_source(tmp_path / "half.gguf"), tmp_path / "again.gguf", "gguf", dtype)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "half.gguf").read_bytes()


def test_a_folder_with_one_gguf_converts_to_a_model_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    file.rename(tmp_path / "only" / "x.gguf")
    convert(find_source(tmp_path / "only"), tmp_path / "dest")
    assert off(tmp_path / "dest", WIDE) < TOLERANCE
    assert Tokenizer.from_folder(tmp_path / "dest").hash == TOKENIZER.hash


def test_generate_takes_a_gguf(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for model in (file, tmp_path / "hub"):
        assert main(["generate", str(model), "--prompt", "the cat", "--max-tokens", "4", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("untied", [False, True])
def test_a_gguf_of_the_gguf_package_computes_what_float64_computes(tmp_path: Path, kind: str, untied: bool) -> None:
    gguf = pytest.importorskip("gguf")
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    for name, value in (architecture(load_config(), mx.float32) | vocabulary(TOKENIZER, 384)).items():
        add(writer, name, value)
    weights = linear(WIDE) | ({"lm_head.weight": WIDE["wte.weight"][::-1].copy()} if untied else {})
    for name, weight in weights.items():
        packed = gguf.quants.quantize(weight, type_) if weight.ndim == 2 and kind != "F32" else weight
        writer.add_tensor(gguf_name(name), packed, raw_dtype=type_ if weight.ndim == 2 else None)
        weights[name] = gguf.quants.dequantize(packed, type_).reshape(weight.shape) if weight.ndim == 2 else weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gpt2(HubWeights(linear(weights), SETTINGS | {"tie_word_embeddings": not untied}), IDS)
    assert np.abs(np.array(load(tmp_path / "x.gguf")[0](IDS)) - expected).max() < TOLERANCE
    assert load(tmp_path / "x.gguf")[1].hash == TOKENIZER.hash


def load_config() -> Any:
    from mlx_gpt.config import GPTConfig

    return GPTConfig(384, T, C, L, H)


def add(writer: Any, name: str, value: Any) -> None:
    """Add a value of MLX's kind with the package's writer."""
    if name == "general.architecture":
        return  # which the writer adds itself
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value.ndim:
        writer.add_array(name, value.tolist())
    elif value.dtype == mx.float32:
        writer.add_float32(name, value.item())
    elif value.dtype == mx.bool_:
        writer.add_bool(name, value.item())
    else:
        writer.add_uint32(name, value.item())


@pytest.mark.parity
@pytest.mark.parametrize("kind", [2, 3, 8])
def test_quantized_blocks_are_decoded_as_the_gguf_package_does(kind: int) -> None:
    gguf = pytest.importorskip("gguf")
    block = TYPES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (50, block.size), np.uint8)
    blocks[:, 1] &= 0x3F  # finite scales
    blocks[:, 3] &= 0x3F
    assert block.decode
    assert np.array_equal(block.decode(blocks), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind)))


# Refusals -------------------------------------------------------------------------------------------------------------


def refusal(file: Path) -> str:
    with pytest.raises(MLXGPTError) as error:
        load(file)
    assert str(error.value).isprintable()
    return str(error.value)


def at_name(content: bytes, name: str, offset: int) -> int:
    return content.index(name.encode()) + len(name) + offset


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"architecture\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2",
            b"architecture\x08\0\0\0\x04\0\0\0\0\0\0\0bert",
            "found 'bert'",
        ),
        (
            b"ggml.model\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2",
            b"ggml.model\x08\0\0\0\x04\0\0\0\0\0\0\0t555",
            "kind of tokenizer",
        ),
        (b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0qwen2", "with words of 'qwen2'"),
        (b"blk.1.ffn_up.bias", b"blk.1.ffn_up.bibs", "h.1.mlp.c_fc.bias: expected shape"),
        (b"gpt2.block_count", b"gpt2.block_cound", "found no gpt2.block_count"),
        (b"GGUF\x03", b"GGUF\x01", "version 1, where 2 and 3 are read"),
    ],
)
def test_another_model_is_refused_by_name(file: Path, old: bytes, new: bytes, message: str) -> None:
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    assert message in refusal(file)


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "values"])
@pytest.mark.parametrize("n", [2**20, 2**63])
def test_absurd_counts_are_refused_before_memory_is_taken(file: Path, at: int, n: int) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + 8] = n.to_bytes(8, "little")
    file.write_bytes(content)
    assert "an invalid header" in refusal(file)
    content[:] = file.read_bytes()
    array = at_name(content, "tokenizer.ggml.tokens", 8)
    content[array : array + 8] = n.to_bytes(8, "little")
    content[at : at + 8] = (1).to_bytes(8, "little")
    file.write_bytes(content)
    refusal(file)


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for end in (*range(4, 3000, 61), *range(3000, len(content), 9973), len(content) - 1):
        file.write_bytes(content[:end])
        assert "expected a whole GGUF file" in refusal(file)
    file.write_bytes(content + bytes(64))
    assert "of which" in refusal(file)


def test_no_flipped_bit_of_the_header_changes_the_logits(file: Path, tmp_path: Path) -> None:
    expected, random = np.array(load(file)[0](IDS)), np.random.default_rng(0)
    content = file.read_bytes()
    start = content.index(b"tokenizer.ggml.add_bos_token")
    loaded = 0
    for at in (*range(4, 700, 29), *random.integers(start, start + 3000, 40).tolist()):
        changed = bytearray(content)
        changed[at] ^= 1 << int(random.integers(8))
        file.write_bytes(changed)
        try:
            model, _ = load(file)
        except MLXGPTError:
            continue
        loaded += 1
        assert model.config.n_head != H or np.array_equal(np.array(model(IDS)), expected)
    assert 0 < loaded < 60


def test_other_quantized_types_take_the_gguf_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(file.read_bytes())
    kind = at_name(content, "token_embd.weight", 4 + 2 * 8)
    assert struct.unpack_from("<I", content, kind) == (0,)
    content[kind] = 14  # Q6_K
    file.write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "token_embd.weight: expected F32, F16, BF16, Q4_0, Q4_1, Q8_0, found type 14" in refusal(file)
    monkeypatch.undo()
    pytest.importorskip("gguf")
    assert "which does not fit its type" in refusal(file)  # a width of 32, not 256
    content[kind] = 99
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match="found type 99; use a file in Q8_0 or F16"):
        read_gguf(file)
