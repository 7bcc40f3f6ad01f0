"""Every layout of GPT-2's weights is recognised and computes what float64 computes.

The files are those of ``layout_files.py``; pickles, which take torch, are in ``test_pickles.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import everything
from helpers.layout_files import (
    IDS,
    NARROW,
    PLAIN,
    TOLERANCE,
    WIDE,
    Arrays,
    bits_of_bfloat16,
    error,
    hub_weights,
    llmc_bytes,
    rounded,
    tensorflow_weights,
    with_buffers,
    write_hub,
    write_llmc,
    write_mlx_lm,
    write_sharded,
    write_tensorflow,
)
from mlx.utils import tree_flatten

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import MLXGPTError, ModelFolderError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.store import folder as folder_module
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load, save
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer

# name -> how to write it, the tensors it means, settings that change the logits
Layout = tuple[Callable[[Path], Path], Arrays, dict[str, Any]]
UNTIED = hub_weights(untied=True)
LAYOUTS: dict[str, Layout] = {
    "hub, no prefix": (lambda p: write_hub(p, PLAIN), PLAIN, {}),
    "hub, prefix, as transformers 5": (
        lambda p: write_hub(p, {f"transformer.{name}": w for name, w in PLAIN.items()}),
        PLAIN,
        {},
    ),
    "hub, mask buffers and a copy of the head": (lambda p: write_hub(p, with_buffers(PLAIN)), PLAIN, {}),
    "hub, sharded, a stale shard beside": (lambda p: write_sharded(p, PLAIN), PLAIN, {}),
    "hub, untied": (lambda p: write_hub(p, UNTIED, tie_word_embeddings=False), UNTIED, {"tie_word_embeddings": False}),
    "hub, resized vocabulary": (lambda p: write_hub(p, WIDE, vocab_size=384), WIDE, {}),
    "hub, exact GELU": (
        lambda p: write_hub(p, PLAIN, activation_function="gelu"),
        PLAIN,
        {"activation_function": "gelu"},
    ),
    "hub, other n_inner": (lambda p: write_hub(p, NARROW, n_inner=24), NARROW, {}),
    "hub, scores by the layer": (
        lambda p: write_hub(p, PLAIN, scale_attn_by_inverse_layer_idx=True),
        PLAIN,
        {"scale_attn_by_inverse_layer_idx": True},
    ),
    "hub, other epsilon, scores not scaled": (
        lambda p: write_hub(p, PLAIN, layer_norm_epsilon=1e-3, scale_attn_weights=False),
        PLAIN,
        {"layer_norm_epsilon": 1e-3, "scale_attn_weights": False},
    ),
    "hub, float16": (
        lambda p: write_hub(p, {name: w.astype(np.float16) for name, w in PLAIN.items()}, "F16"),
        rounded(PLAIN, "F16"),
        {},
    ),
    "hub, bfloat16": (
        lambda p: write_hub(p, {name: bits_of_bfloat16(w) for name, w in PLAIN.items()}, "BF16"),
        rounded(PLAIN, "BF16"),
        {},
    ),
    "mlx-lm": (lambda p: write_mlx_lm(p, PLAIN), PLAIN, {}),
    "llm.c, float32": (lambda p: write_llmc(p, PLAIN), PLAIN, {}),
    "llm.c, bfloat16": (lambda p: write_llmc(p, PLAIN, 5), rounded(PLAIN, "BF16"), {}),
    "OpenAI's for TensorFlow": (write_tensorflow, tensorflow_weights(), {"n_layer": 2, "n_head": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_computes_what_float64_computes(tmp_path: Path, layout: str) -> None:
    write, weights, settings = LAYOUTS[layout]
    source = write(tmp_path / "source")
    convert(find_source(source), tmp_path / "dest")
    off = error(tmp_path / "dest", weights, **settings)
    print(f"{layout}: off by {off:.1e}")
    assert off < TOLERANCE
    model, tokenizer = load(source)  # directly, with the same bits
    ids = IDS[:, : model.config.n_positions]
    assert mx.array_equal(model(ids), load(tmp_path / "dest")[0](ids))
    assert tokenizer.hash == Tokenizer.bytes().hash
    assert {file.name for file in (tmp_path / "dest").iterdir()} == {
        *("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    }


def test_the_tolerance_detects_a_transposed_square_matrix(tmp_path: Path) -> None:
    wrong = PLAIN | {"h.1.attn.c_proj.weight": np.ascontiguousarray(PLAIN["h.1.attn.c_proj.weight"].T)}
    assert error(write_hub(tmp_path / "a", wrong), PLAIN) > 500 * TOLERANCE


@pytest.mark.parametrize("layout", ["hub, no prefix", "llm.c, bfloat16"])
@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_tensor_is_cast_to_the_requested_dtype(tmp_path: Path, layout: str, dtype: mx.Dtype | None) -> None:
    write, weights, _ = LAYOUTS[layout]
    convert(find_source(write(tmp_path / "source")), tmp_path / "dest", dtype)
    own = mx.bfloat16 if "bfloat16" in layout else mx.float32
    found = mx.load(str(tmp_path / "dest" / "model.safetensors"))
    assert {weight.dtype for weight in found.values()} == {dtype or own}
    assert all(mx.array_equal(found[name], mx.array(w).astype(dtype or own)) for name, w in weights.items())
    config = json.loads((tmp_path / "dest" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype or own).removeprefix("mlx.core.")


@pytest.mark.freed_at_once
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=257, n_positions=8, n_embd=128, n_layer=12, n_head=2)
    save(GPT(config), Tokenizer.bytes(), tmp_path / "source")
    largest = 4 * 4 * 128 * 128
    total = (tmp_path / "source" / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    for k, (dtype, bits) in enumerate([(None, None), (mx.float16, None), (None, 8)]):
        source = find_source(tmp_path / "source")
        mx.reset_peak_memory()
        convert(source, tmp_path / f"dest{k}", dtype, bits)
        assert mx.get_peak_memory() - before < 4 * largest < total / 8


# Quantized


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_loads_as_the_model_that_quantize_makes(tmp_path: Path, bits: int, tied: bool) -> None:
    mx.random.seed(0)
    model = GPT(GPTConfig(257, 8, 64, 2, 2, initializer_range=0.3, tie_word_embeddings=tied)).eval()
    save(model, Tokenizer.bytes(), tmp_path / "floats")
    convert(find_source(tmp_path / "floats"), tmp_path / "packed", bits=bits)
    again, _ = load(tmp_path / "packed")
    assert mx.array_equal(again(IDS[:, :8]), quantize(model, bits)(IDS[:, :8]))
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert settings["quantization"] == settings["quantization_config"] == {"group_size": 64, "bits": bits}
    with pytest.raises(ModelFolderError, match="is quantized already"):
        convert(find_source(tmp_path / "packed"), tmp_path / "again")
    with pytest.raises(ModelFolderError, match=r"is quantized already, to . bits; export"):
        export(find_source(tmp_path / "packed"), tmp_path / "x.bin", "llm.c")


@pytest.mark.parity
def test_mlx_lm_opens_what_quantize_writes_and_we_open_what_it_writes(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    mx.random.seed(0)
    save(GPT(GPTConfig(257, 16, 64, 2, 2, initializer_range=0.3)), Tokenizer.bytes(), tmp_path / "floats")
    convert(find_source(tmp_path / "floats"), tmp_path / "ours", bits=4)
    mlx_lm.convert(str(tmp_path / "floats"), str(tmp_path / "theirs"), quantize=True, q_bits=8, dtype="float32")
    for name in ("ours", "theirs"):
        theirs, _ = mlx_lm.load(str(tmp_path / name))
        expected = np.array(theirs(mx.array(IDS)))
        assert np.abs(np.array(load(tmp_path / name)[0](IDS)) - expected).max() < 2e-5 * np.abs(expected).max()


# Damage


def test_a_damaged_llmc_file_is_refused(tmp_path: Path) -> None:
    file = write_llmc(tmp_path, PLAIN)
    whole = file.read_bytes()
    for content, message in [
        (whole[:-4], f"expected {len(whole)} bytes, as its header says"),
        (whole + b"\0", f"found {len(whole) + 1}"),
        (whole[:16], "expected llm.c's version 3"),
        (llmc_bytes(PLAIN, 2), r"expected llm.c's version 3 (float32) or 5 (bfloat16), found [2]"),
        (whole[:16] + (2**30).to_bytes(4, "little") + whole[20:], "as its header says (1073741824 layers"),
        (whole[:20] + (5).to_bytes(4, "little") + whole[24:], "n_embd must be a multiple of n_head"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ModelFolderError) as refusal:
            load(file)
        assert message in str(refusal.value)


def test_a_damaged_tensorflow_checkpoint_gives_an_error_or_the_values(tmp_path: Path) -> None:
    source = write_tensorflow(tmp_path)
    index, rng = source / "model.ckpt.index", np.random.default_rng(0)
    whole = index.read_bytes()
    read = 0
    for _ in range(300):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.1 else whole)
        for at in rng.integers(0, max(1, len(damaged)), rng.integers(1, 4)):
            damaged[at : at + 1] = rng.bytes(1)
        index.write_bytes(damaged)
        with suppress(ModelFolderError):  # and no other error
            find_source(source).parameters()
            read += 1
    assert 0 < read < 200
    index.write_bytes(whole)
    data = source / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ModelFolderError, match=r"of shape .* at bytes"):
        find_source(source)
    data.unlink()
    with pytest.raises(ModelFolderError, match=r"data-00000-of-00001: cannot be read"):
        find_source(source)
    (source / "hparams.json").write_text(
        '{"n_vocab": 257, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 2, "rope": 1}'
    )
    with pytest.raises(ModelFolderError, match="rope is a setting of another model"):
        find_source(source)


@pytest.mark.parametrize("dtype", [None, mx.float16])
def test_an_overflow_in_the_new_dtype_is_refused_and_nothing_is_left(tmp_path: Path, dtype: mx.Dtype | None) -> None:
    huge = PLAIN["ln_f.bias"].copy()
    huge[3] = np.nan if dtype is None else 1e5
    source = write_hub(tmp_path / "hub", PLAIN | {"ln_f.bias": huge})
    with pytest.raises(ModelFolderError, match=r"ln_f\.bias: expected numbers, found NaN or infinity"):
        convert(find_source(source), tmp_path / "dest", dtype)
    assert not (tmp_path / "dest").exists()


# Existing files stay, failures leave nothing


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub", PLAIN)
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    for dest in (source, tmp_path / "file"):
        with pytest.raises(UsageError, match="exists already"):
            convert(find_source(source), dest)
        with pytest.raises(UsageError, match="exists already"):
            export(find_source(source), dest, "llm.c")
    with pytest.raises(UsageError, match="its folder does not exist; create it"):
        export(find_source(source), tmp_path / "no" / "x.bin", "llm.c")
    with pytest.raises(UsageError, match=r"llm\.c takes float32 or bfloat16, not float16"):
        export(find_source(source), tmp_path / "x.bin", "llm.c", mx.float16)
    with pytest.raises(UsageError, match="in groups of 64, but this model's widths are 32 and 128"):
        convert(find_source(source), tmp_path / "dest", bits=4)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), RuntimeError("bad"), KeyboardInterrupt()])
def test_a_failed_conversion_or_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    source, calls = write_hub(tmp_path / "hub", PLAIN), iter(range(1000))
    before = everything(tmp_path)
    raw_bytes = folder_module.write_safetensors.__globals__["raw_bytes"]

    def fails(weight: mx.array) -> memoryview:
        if next(calls) % 10 == 9:
            raise trouble
        return raw_bytes(weight)

    monkeypatch.setattr("mlx_gpt.store.safetensors.raw_bytes", fails)
    monkeypatch.setattr("mlx_gpt.store.llmc.raw_bytes", fails)
    expected = KeyboardInterrupt if isinstance(trouble, KeyboardInterrupt) else ModelFolderError
    with pytest.raises(expected):
        convert(find_source(source), tmp_path / "dest")
    with pytest.raises(expected):
        export(find_source(source), tmp_path / "x.bin", "llm.c")
    assert everything(tmp_path) == before


# From the command line


def test_the_command_line_converts_exports_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hub(Path("hub"), PLAIN)
    Tokenizer.bytes().save(tmp_path)  # next to gpt2.bin
    assert main(["export", "hub", "gpt2.bin", "--to", "llm.c"]) == 0
    assert main(["convert", "gpt2.bin", "dest", "--dtype", "float16"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "gpt2.bin: " in output.err
    assert "from llm.c" in output.err
    assert output.err.endswith("next: mlx-gpt generate dest\n")
    texts = []
    for model in ("hub", "gpt2.bin"):
        assert main(["generate", model, "--prompt", "a", "--max-tokens", "5", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["convert", "hub", "dest"]) == 2
    assert capsys.readouterr().err == "mlx-gpt: dest exists already; choose a new folder, or remove it\n"
    assert dict(tree_flatten(load("dest")[0].parameters())).keys() == PLAIN.keys()


def test_a_setting_that_is_unknown_or_another_models_is_refused_by_name(tmp_path: Path) -> None:
    for name, value in {
        "add_cross_attention": True,
        "rope_theta": 1e4,
        "quantization_config": {"quant_method": "gptq"},
    }.items():
        source = write_hub(tmp_path / name, PLAIN, **{name: value})
        with pytest.raises(MLXGPTError, match=name):
            find_source(source)
