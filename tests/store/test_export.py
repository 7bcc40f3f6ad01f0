"""Exported files equal the other programs', byte for byte or name for name; other models are refused by name."""

from __future__ import annotations

import json
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
    SETTINGS,
    TOLERANCE,
    WIDE,
    C,
    H,
    L,
    T,
    linear,
    llmc_bytes,
    write_hub,
)

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer


@pytest.mark.parametrize(("dtype", "version"), [(mx.float32, 3), (mx.bfloat16, 5)], ids=str)
def test_an_exported_llmc_file_is_llmcs_byte_for_byte_and_converts_back(
    tmp_path: Path, dtype: mx.Dtype, version: int
) -> None:
    write_hub(tmp_path / "hub", PLAIN)
    remark = export(find_source(tmp_path / "hub"), tmp_path / "hub" / "x.bin", "llm.c", dtype)
    assert f"not in x.bin: for mlx-gpt, copy vocab.json and merges.txt of {tmp_path / 'hub'} beside it" in remark
    assert (tmp_path / "hub" / "x.bin").read_bytes() == llmc_bytes(PLAIN, version)
    convert(find_source(tmp_path / "hub" / "x.bin"), tmp_path / "back")
    export(find_source(tmp_path / "back"), tmp_path / "y.bin", "llm.c", dtype)
    assert (tmp_path / "y.bin").read_bytes() == llmc_bytes(PLAIN, version)
    if version == 3:
        found = mx.load(str(tmp_path / "back" / "model.safetensors"))
        assert all(np.array_equal(np.array(found[name]), weight) for name, weight in PLAIN.items())


@pytest.fixture
def with_merges(tmp_path: Path) -> Path:
    """Create a folder whose tokenizer has merges, and fewer ids than the model."""
    write_hub(tmp_path / "hub", WIDE, vocab_size=384)
    Tokenizer.train(["the cat and the hat sat on the mat"] * 3, 265).save(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "kind"), [(mx.float32, "F32"), (mx.float16, "F16")], ids=str)
def test_an_exported_gguf_opens_with_llama_cpps_names_and_metadata(
    with_merges: Path, tmp_path: Path, dtype: mx.Dtype, kind: str
) -> None:
    gguf = pytest.importorskip("gguf")
    export(find_source(with_merges), tmp_path / "x.gguf", "gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, L)  # as llama.cpp's converter names the hub's tensors
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(WIDE)
    for name, weight in linear(WIDE).items():
        tensor = found[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        is_small = weight.ndim == 1 or name == "wpe.weight"
        assert tensor.tensor_type.name == ("F32" if is_small else kind)
        assert tensor.shape.tolist() == list(weight.shape[::-1])  # GGUF counts from the last axis
        assert np.array_equal(tensor.data, weight if is_small else weight.astype(tensor.data.dtype))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = Tokenizer.from_folder(with_merges)
    assert fields["general.architecture"] == fields["tokenizer.ggml.model"] == "gpt2"
    settings = {"block_count": L, "context_length": T, "embedding_length": C, "feed_forward_length": 4 * C}
    settings |= {"attention.head_count": H, "attention.layer_norm_epsilon": np.float32(1e-5)}
    assert {name: fields[f"gpt2.{name}"] for name in settings} == settings
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 384
    vocab = json.loads((with_merges / "vocab.json").read_text())
    assert {token: i for i, token in enumerate(tokens[:265])} == vocab
    assert kinds[:264] == [1] * 264
    assert kinds[264] == 3  # <|endoftext|>
    assert kinds[265:] == [5] * 119
    assert fields["tokenizer.ggml.merges"] == (with_merges / "merges.txt").read_text().splitlines()[1:]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot_id == 264


@pytest.mark.parity
def test_transformers_reads_an_exported_gguf_with_the_same_logits(with_merges: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # required by transformers
    export(find_source(with_merges), tmp_path / "x.gguf", "gguf")
    config = transformers.GPT2Config(
        **SETTINGS | {"vocab_size": 384}
    )  # transformers assumes GPT-2's vocabulary for a GGUF
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file="x.gguf", config=config).eval()
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(found - gpt2(HubWeights(WIDE, SETTINGS), IDS)).max() < TOLERANCE


def test_a_gguf_may_have_any_name(with_merges: Path, tmp_path: Path) -> None:
    for name in ("x.gguf", "x.bin", "x"):
        assert export(find_source(with_merges), tmp_path / name, "gguf") == ""
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "x.bin").read_bytes() == (tmp_path / "x").read_bytes()


def test_a_gguf_requires_merges(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="bytes only: it cannot be exported; export it --to nanogpt"):
        export(find_source(write_hub(tmp_path / "hub", PLAIN)), tmp_path / "x.gguf", "gguf")
    assert everything(tmp_path).keys() == {"hub", *(f"hub/{file.name}" for file in (tmp_path / "hub").iterdir())}


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        (
            "llm.c",
            {"activation_function": "gelu"},
            "only, this model has gelu: it cannot be exported; export it --to nanogpt",
        ),
        (
            "nanogpt",
            {"activation_function": "relu"},
            "activation_function = gelu or gelu_new only, this model has relu",
        ),
        ("gguf", {"activation_function": "silu"}, "activation_function = gelu_new only, this model has silu"),
        (
            "llm.c",
            {"layer_norm_epsilon": 1e-6},
            "1e-05 only, this model has 1e-06: it cannot be exported; export it --to gguf",
        ),
        ("nanogpt", {"scale_attn_weights": False}, "scale_attn_weights = True only, this model has False"),
        ("gguf", {"scale_attn_by_inverse_layer_idx": True}, "exported; use its folder, which transformers and mlx"),
    ],
)
def test_a_setting_that_the_other_program_ignores_is_refused_by_name(
    tmp_path: Path, to: str, settings: dict[str, Any], message: str
) -> None:
    source = find_source(write_hub(tmp_path / "hub", PLAIN, **settings))
    with pytest.raises(ModelFolderError) as refusal:
        export(source, tmp_path / "x", to)
    assert message in str(refusal.value)


def test_another_name_of_gpt2s_activation_is_exported(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", PLAIN, activation_function="gelu_pytorch_tanh")
    export(find_source(hub), tmp_path / "x.bin", "llm.c")
    assert find_source(tmp_path / "x.bin").config.activation_function == "gelu_new"


def test_another_inner_width_is_not_exported_to_llmc(tmp_path: Path) -> None:
    source = find_source(write_hub(tmp_path / "hub", NARROW, n_inner=24))
    with pytest.raises(ModelFolderError, match=r"n_inner = 4 \* n_embd only, this model has 24"):
        export(source, tmp_path / "x", "llm.c")
