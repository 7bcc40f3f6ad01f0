"""GPT-2's weights as people have them: each layout is recognised by itself and computes what float64 computes.

Files are written here with NumPy, torch or json alone, never with what is tested; TensorFlow's by TensorFlow itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from command_line import everything
from mlx.utils import tree_flatten
from reference_numpy import gpt2

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import MLXGPTError, ModelFolderError, UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.store import folder as folder_module
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load, save
from mlx_gpt.store.source import find_source
from mlx_gpt.text.tokenizer import Tokenizer

V, T, C, L, H = 257, 12, 32, 3, 4
SETTINGS: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_positions": T,
    "n_embd": C,
    "n_layer": L,
    "n_head": H,
}
IDS = np.random.default_rng(1).integers(0, V, (2, T))
TENSORFLOW = Path(__file__).parent / "fixtures" / "tiny-gpt2-tensorflow"
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Logits here reach 22. In float32 the largest errors measured were 1.3e-5 (nanoGPT) and 4.2e-6 (all else); a square
# matrix that is not transposed moves them by more than 1e-2.
TOLERANCE = 2e-5

Arrays = dict[str, np.ndarray]


def hub_weights(vocab: int = V, inner: int = 4 * C, untied: bool = False) -> Arrays:
    """The hub's tensors without a prefix, each of them random, the same each time."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, C), "wpe.weight": (T, C)}
    for i in range(L):
        for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C)):
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        for name, n_in, n_out in (("mlp.c_fc", C, inner), ("mlp.c_proj", inner, C)):
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        shapes |= {f"h.{i}.{ln}.{part}": (C,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)} | ({"lm_head.weight": (vocab, C)} if untied else {})
    return {
        name: (("ln_" in name and name.endswith("weight")) + rng.normal(0, 0.3, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def linear(weights: Arrays) -> Arrays:
    """The same with matrices (out, in)."""
    return {name: np.ascontiguousarray(w.T) if name.endswith(MATRICES) else w for name, w in weights.items()}


def write_safetensors(file: Path, weights: Arrays, kind: str = "F32") -> None:
    header, data = {}, b""
    for name, weight in weights.items():
        raw = weight.tobytes()
        header[name] = {"dtype": kind, "shape": weight.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_hub(place: Path, weights: Arrays, kind: str = "F32", **settings: Any) -> Path:
    Tokenizer.bytes().save(place)
    (place / "config.json").write_text(json.dumps(SETTINGS | settings))
    write_safetensors(place / "model.safetensors", weights, kind)
    return place


def write_sharded(place: Path, weights: Arrays) -> Path:
    write_hub(place, weights)
    (place / "model.safetensors").unlink()
    names, index = list(weights), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{k}-of-00002.safetensors"
        write_safetensors(place / shard, {name: weights[name] for name in part})
        index |= dict.fromkeys(part, shard)
    write_safetensors(place / "model-00003-of-00003.safetensors", {"wte.weight": np.zeros((V, C), np.float32)})  # stale
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return place


def with_buffers(weights: Arrays) -> Arrays:
    """As older files have it: a prefix, masks, and the tied head once more."""
    old = {f"transformer.{name}": weight for name, weight in weights.items()}
    for i in range(L):
        old[f"transformer.h.{i}.attn.bias"] = np.tri(T, dtype=np.float32).reshape(1, 1, T, T)
        old[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return old | {"lm_head.weight": weights["wte.weight"]}


def bits_of_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of a float32, rounded to the nearest, to even where that is in the middle."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(weights: Arrays, kind: str) -> Arrays:
    """What half precision leaves of them."""
    if kind == "F16":
        return {name: w.astype(np.float16).astype(np.float32) for name, w in weights.items()}
    return {name: (bits_of_bfloat16(w).astype(np.uint32) << 16).view(np.float32) for name, w in weights.items()}


def llmc_bytes(weights: Arrays, version: int = 3, vocab: int = V) -> bytes:
    """A file of llm.c's: header, then kind by kind over all layers, the vocabulary padded to a multiple of 128."""
    w, padded = linear(weights), -(-vocab // 128) * 128
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, T, vocab, L, H, C, padded
    parts = [np.concatenate([w["wte.weight"], np.zeros((padded - vocab, C), np.float32)]), w["wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            parts.append(np.stack([w[f"h.{i}.{kind}.{part}"] for i in range(L)]))
    values = np.concatenate([part.ravel() for part in (*parts, w["ln_f.weight"], w["ln_f.bias"])])
    return header.tobytes() + (values if version == 3 else bits_of_bfloat16(values)).tobytes()


def write_llmc(place: Path, weights: Arrays, version: int = 3, **options: Any) -> Path:
    Tokenizer.bytes().save(place)
    (place / "gpt2.bin").write_bytes(llmc_bytes(weights, version, **options))
    return place / "gpt2.bin"


def write_mlx_lm(place: Path, weights: Arrays) -> Path:
    write_hub(place, {f"model.{name}": weight for name, weight in linear(weights).items()})
    return place


def write_tensorflow(place: Path) -> Path:
    """TensorFlow's own files, with the tokenizer under OpenAI's names."""
    shutil.copytree(TENSORFLOW, place, dirs_exist_ok=True)
    Tokenizer.bytes().save(place / "tokenizer")
    shutil.move(place / "tokenizer" / "vocab.json", place / "encoder.json")
    shutil.move(place / "tokenizer" / "merges.txt", place / "vocab.bpe")
    shutil.rmtree(place / "tokenizer")
    return place


def tensorflow_weights() -> Arrays:
    """TensorFlow's values by the hub's names."""
    last = {"g": "weight", "w": "weight", "b": "bias"}
    weights = {}
    for name, value in np.load(TENSORFLOW / "values.npz").items():
        *path, kind = name.removeprefix("model/").replace("h0/", "h/0/").replace("h1/", "h/1/").split("/")
        short = ".".join([*path, last[kind]] if kind in last else [kind, "weight"])
        weights[short] = value[0] if value.ndim == 3 else value
    return weights


# name -> how to write it, the tensors it means, settings that change the numbers
Layout = tuple[Callable[[Path], Path], Arrays, dict[str, Any]]
PLAIN, WIDE, UNTIED = hub_weights(), hub_weights(vocab=384), hub_weights(untied=True)
NARROW = hub_weights(inner=24)
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


def error(path: Path, weights: Arrays, **settings: Any) -> float:
    """How far the logits of a loaded folder are from float64's, at most."""
    ids = IDS[:, : weights["wpe.weight"].shape[0]]
    expected, _ = gpt2(weights, SETTINGS | settings, ids)
    found = np.array(load(path)[0](ids)).astype(np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_computes_what_float64_computes(tmp_path: Path, layout: str) -> None:
    write, weights, settings = LAYOUTS[layout]
    source = write(tmp_path / "source")
    convert(find_source(source), tmp_path / "dest")
    off = error(tmp_path / "dest", weights, **settings)
    print(f"{layout}: off by {off:.1e}")
    assert off < TOLERANCE
    model, tokenizer = load(source)  # directly, and bit for bit the same
    ids = IDS[:, : model.config.n_positions]
    assert mx.array_equal(model(ids), load(tmp_path / "dest")[0](ids))
    assert tokenizer.hash == Tokenizer.bytes().hash
    assert {file.name for file in (tmp_path / "dest").iterdir()} == {
        *("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    }


def test_the_tolerance_sees_a_square_matrix_transposed(tmp_path: Path) -> None:
    wrong = PLAIN | {"h.1.attn.c_proj.weight": np.ascontiguousarray(PLAIN["h.1.attn.c_proj.weight"].T)}
    assert error(write_hub(tmp_path / "a", wrong), PLAIN) > 500 * TOLERANCE


@pytest.mark.parametrize("layout", ["hub, no prefix", "llm.c, bfloat16"])
@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_tensor_becomes_the_dtype_that_was_asked_for(tmp_path: Path, layout: str, dtype: mx.Dtype | None) -> None:
    write, weights, _ = LAYOUTS[layout]
    convert(find_source(write(tmp_path / "source")), tmp_path / "dest", dtype)
    own = mx.bfloat16 if "bfloat16" in layout else mx.float32
    found = mx.load(str(tmp_path / "dest" / "model.safetensors"))
    assert {weight.dtype for weight in found.values()} == {dtype or own}
    assert all(mx.array_equal(found[name], mx.array(w).astype(dtype or own)) for name, w in weights.items())
    config = json.loads((tmp_path / "dest" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype or own).removeprefix("mlx.core.")


def test_one_tensor_after_the_other_is_in_memory(tmp_path: Path) -> None:
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
    with pytest.raises(ModelFolderError, match="is quantized; export"):
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


# Exported


@pytest.mark.parametrize(("dtype", "version"), [(mx.float32, 3), (mx.bfloat16, 5)], ids=str)
def test_an_exported_llmc_file_is_llmcs_byte_for_byte_and_comes_back(
    tmp_path: Path, dtype: mx.Dtype, version: int
) -> None:
    write_hub(tmp_path / "hub", PLAIN)
    assert export(find_source(tmp_path / "hub"), tmp_path / "hub" / "x.bin", "llm.c", dtype) == ""
    assert (tmp_path / "hub" / "x.bin").read_bytes() == llmc_bytes(PLAIN, version)
    convert(find_source(tmp_path / "hub" / "x.bin"), tmp_path / "back")
    export(find_source(tmp_path / "back"), tmp_path / "y.bin", "llm.c", dtype)
    assert (tmp_path / "y.bin").read_bytes() == llmc_bytes(PLAIN, version)
    if version == 3:
        found = mx.load(str(tmp_path / "back" / "model.safetensors"))
        assert all(np.array_equal(np.array(found[name]), weight) for name, weight in PLAIN.items())


@pytest.fixture
def with_merges(tmp_path: Path) -> Path:
    """A folder whose tokenizer has merges, and fewer ids than the model."""
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
    pytest.importorskip("accelerate")  # transformers wants it for this
    export(find_source(with_merges), tmp_path / "x.gguf", "gguf")
    config = transformers.GPT2Config(
        **SETTINGS | {"vocab_size": 384}
    )  # of a GGUF it takes GPT-2's vocabulary for granted
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file="x.gguf", config=config).eval()
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(found - gpt2(WIDE, SETTINGS, IDS)[0]).max() < TOLERANCE


def test_a_gguf_wants_merges(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="needs a tokenizer with merges"):
        export(find_source(write_hub(tmp_path / "hub", PLAIN)), tmp_path / "x.gguf", "gguf")
    assert everything(tmp_path).keys() == {"hub", *(f"hub/{file.name}" for file in (tmp_path / "hub").iterdir())}


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        (
            "llm.c",
            {"activation_function": "gelu"},
            "llm.c computes activation_function = gelu_new only, this model has",
        ),
        ("llm.c", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-05 only, this model has 1e-06"),
        ("nanogpt", {"scale_attn_weights": False}, "scale_attn_weights = True only, this model has False"),
        ("gguf", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = False only"),
    ],
)
def test_a_setting_that_the_other_program_ignores_is_refused_by_name(
    tmp_path: Path, to: str, settings: dict[str, Any], message: str
) -> None:
    source = find_source(write_hub(tmp_path / "hub", PLAIN, **settings))
    with pytest.raises(ModelFolderError) as refusal:
        export(source, tmp_path / "x", to)
    assert message in str(refusal.value)


def test_another_inner_width_has_no_place_in_llmc(tmp_path: Path) -> None:
    source = find_source(write_hub(tmp_path / "hub", NARROW, n_inner=24))
    with pytest.raises(ModelFolderError, match=r"n_inner = 4 \* n_embd only, this model has 24"):
        export(source, tmp_path / "x", "llm.c")


# With torch


def torch_gpt(config: dict[str, Any], exact: bool = True) -> Any:
    """A model in torch whose parameters have nanoGPT's names and shapes."""
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, bias = config["n_embd"], config["bias"]
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

        def forward(self, x: Any) -> Any:
            B, n, width = x.shape
            q, k, v = (p.view(B, n, config["n_head"], -1).transpose(1, 2) for p in self.c_attn(x).chunk(3, -1))
            moved = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(moved.transpose(1, 2).reshape(B, n, width))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, bias = config["n_embd"], config["bias"]
            self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
            self.attn = Attention()
            self.mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)}
            )

        def forward(self, x: Any) -> Any:
            x = x + self.attn(self.ln_1(x))
            inner = nn.functional.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="none" if exact else "tanh")
            return x + self.mlp.c_proj(inner)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {
                "wte": nn.Embedding(config["vocab_size"], config["n_embd"]),
                "wpe": nn.Embedding(config["block_size"], config["n_embd"]),
                "h": nn.ModuleList(Layer() for _ in range(config["n_layer"])),
                "ln_f": nn.LayerNorm(config["n_embd"], bias=config["bias"]),
            }
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = nn.Linear(config["n_embd"], config["vocab_size"], bias=False)
            self.lm_head.weight = self.transformer.wte.weight

        def forward(self, ids: Any) -> Any:
            x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
            for layer in self.transformer.h:
                x = layer(x)
            return self.lm_head(self.transformer.ln_f(x))

    return Whole().eval()


NANOGPT = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, "bias": True, "dropout": 0.1}


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_computes_what_torch_computes(tmp_path: Path, bias: bool, prefix: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    args = NANOGPT | {"bias": bias}
    model = torch_gpt(args)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    state = {f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    mask = torch.ones(T, T).tril().view(1, 1, T, T)
    state |= {f"{prefix}transformer.h.{i}.attn.bias": mask for i in range(L)}  # as before torch 2
    content = {"model": state, "optimizer": {"state": {}}, "model_args": args, "iter_num": 7, "best_val_loss": 1.5}
    torch.save(content, tmp_path / "ckpt.pt")
    Tokenizer.bytes().save(tmp_path)
    convert(find_source(tmp_path / "ckpt.pt", pickles=True), tmp_path / "dest")
    convert(find_source(tmp_path, pickles=True), tmp_path / "again")  # nanoGPT's folder, as well
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "dest" / "model.safetensors"
    ).read_bytes()
    with torch.no_grad():
        expected = model.double()(torch.tensor(IDS)).numpy()
    found = np.array(load(tmp_path / "dest")[0](IDS))
    print(f"nanoGPT, bias={bias}: off by {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(found - expected).max() < TOLERANCE
    weights = {name: np.array(w) for name, w in mx.load(str(tmp_path / "dest" / "model.safetensors")).items()}
    assert error(tmp_path / "dest", weights, activation_function="gelu") < TOLERANCE
    assert load(tmp_path / "dest")[0].config.attn_pdrop == 0.1


@pytest.mark.parity
@pytest.mark.parametrize("exact", [True, False])
def test_an_exported_nanogpt_checkpoint_loads_into_nanogpts_modules(tmp_path: Path, exact: bool) -> None:
    torch = pytest.importorskip("torch")
    write_hub(tmp_path / "hub", PLAIN, activation_function="gelu" if exact else "gelu_new")
    remark = export(find_source(tmp_path / "hub"), tmp_path / "ckpt.pt", "nanogpt")
    assert ("exact GELU" in remark) is not exact
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"] == NANOGPT | {"dropout": 0.0}
    model = torch_gpt(checkpoint["model_args"], exact)
    model.load_state_dict(checkpoint["model"])  # strict: no name too many, none too few
    with torch.no_grad():
        found = model(torch.tensor(IDS)).numpy()
    expected, _ = gpt2(PLAIN, SETTINGS | {"activation_function": "gelu" if exact else "gelu_new"}, IDS)
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("case", ["whole", "sharded", "bfloat16", "a file of its own name", "not zipped"])
def test_a_pytorch_model_bin_is_read_with_torch(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    source = write_hub(tmp_path / "hub", PLAIN)
    (source / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(weight) for name, weight in with_buffers(PLAIN).items()}
    tensors["transformer.h.0.attn.bias"] = tensors["transformer.h.0.attn.bias"].bool()
    expected = PLAIN
    if case == "bfloat16":
        tensors = {name: weight.bfloat16() for name, weight in tensors.items()}
        expected = rounded(PLAIN, "BF16")
    if case == "sharded":
        tensors = {name: w for name, w in tensors.items() if not name.endswith((".attn.bias", ".masked_bias"))}
        names, index = list(tensors), {}
        for k, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"pytorch_model-0000{k}-of-00002.bin"
            torch.save({name: tensors[name] for name in part}, source / shard)
            index |= dict.fromkeys(part, shard)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        path = source
    else:
        path = source / "pytorch_model.bin" if case != "a file of its own name" else source / "weights.pt"
        torch.save(tensors, path, _use_new_zipfile_serialization=case != "not zipped")
        path = path if case == "a file of its own name" else source
    with pytest.raises(ModelFolderError, match="found a pickle"):
        load(path)
    convert(find_source(path, pickles=True), tmp_path / "dest")
    off = error(tmp_path / "dest", expected)
    print(f"pytorch_model.bin, {case}: off by {off:.1e}")
    assert off < TOLERANCE


class Malicious:
    """A pickle of it makes a file when it is opened naively."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> Any:
        return (open, (self.trace, "w"))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    source = write_hub(tmp_path / "hub", PLAIN)
    (source / "model.safetensors").unlink()
    torch.save({"model": Malicious(str(tmp_path / "trace")), "model_args": NANOGPT}, source / name)
    with pytest.raises(ModelFolderError, match="no code in it was run") as refusal:
        find_source(source / name, pickles=True)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"use_rmsnorm": True}, "and use_rmsnorm is none of them"),
        ({"n_head": ...}, "and n_head is missing"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head"),
    ],
)
def test_settings_that_nanogpt_does_not_have_are_refused_by_name(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    torch = pytest.importorskip("torch")
    args = {name: value for name, value in (NANOGPT | args).items() if value is not ...}
    torch.save({"model": {"transformer.wte.weight": torch.zeros(V, C)}, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(ModelFolderError) as refusal:
        find_source(tmp_path / "ckpt.pt", pickles=True)
    assert message in str(refusal.value)


def test_without_torch_a_pickle_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ModelFolderError, match=r"takes torch to read or write: pip install 'torch>=2\.6'"):
        find_source(tmp_path / "ckpt.pt", pickles=True)
    write_hub(tmp_path / "hub", PLAIN)
    with pytest.raises(ModelFolderError, match="takes torch to read or write"):
        export(find_source(tmp_path / "hub"), tmp_path / "x.pt", "nanogpt")
    assert not list(tmp_path.glob("*x.pt*"))


def test_a_torch_that_opens_pickles_unsafely_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    sys.modules["torch"].__version__ = "2.5.1+cpu"  # type: ignore[attr-defined]
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ModelFolderError, match=r"torch 2\.5\.1\+cpu does not open a pickle safely"):
        find_source(tmp_path / "ckpt.pt", pickles=True)


# Damage


def test_a_damaged_llmc_file_is_told(tmp_path: Path) -> None:
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
def test_what_is_no_number_in_the_new_dtype_is_told_and_nothing_is_left(tmp_path: Path, dtype: mx.Dtype | None) -> None:
    huge = PLAIN["ln_f.bias"].copy()
    huge[3] = np.nan if dtype is None else 1e5
    source = write_hub(tmp_path / "hub", PLAIN | {"ln_f.bias": huge})
    with pytest.raises(ModelFolderError, match=r"ln_f\.bias: expected numbers, found NaN or infinity"):
        convert(find_source(source), tmp_path / "dest", dtype)
    assert not (tmp_path / "dest").exists()


# What is there stays, what fails leaves nothing


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub", PLAIN)
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    for dest in (source, tmp_path / "file"):
        with pytest.raises(UsageError, match="exists already"):
            convert(find_source(source), dest)
        with pytest.raises(UsageError, match="exists already"):
            export(find_source(source), dest, "llm.c")
    with pytest.raises(UsageError, match="expected its folder to be there"):
        export(find_source(source), tmp_path / "no" / "x.bin", "llm.c")
    with pytest.raises(UsageError, match=r"llm\.c takes float32 or bfloat16, not float16"):
        export(find_source(source), tmp_path / "x.bin", "llm.c", mx.float16)
    with pytest.raises(UsageError, match="in groups of 64, but this model's widths are 32 and 128"):
        convert(find_source(source), tmp_path / "dest", bits=4)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), RuntimeError("bad"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    source, calls = write_hub(tmp_path / "hub", PLAIN), iter(range(1000))
    before = everything(tmp_path)
    raw_bytes = folder_module.write_safetensors.__globals__["raw_bytes"]

    def fails(weight: mx.array) -> memoryview:
        if next(calls) % 10 == 9:
            raise trouble
        return raw_bytes(weight)

    monkeypatch.setattr("mlx_gpt.store.tensors.raw_bytes", fails)
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
    Tokenizer.bytes().save(tmp_path)  # beside gpt2.bin
    assert main(["export", "hub", "gpt2.bin", "--to", "llm.c"]) == 0
    assert main(["convert", "gpt2.bin", "dest", "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "gpt2.bin: " in said.err
    assert "from llm.c" in said.err
    assert said.err.endswith("next: mlx-gpt generate dest\n")
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
