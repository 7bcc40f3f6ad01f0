"""A small GPT-2 in every layout, and the error of its logits once read.

Files are written with NumPy and json alone, never with the code under test; TensorFlow's by TensorFlow itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.store.folder import load
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
TENSORFLOW = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2-tensorflow"
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Logits here reach 22. In float32 the largest errors measured were 1.3e-5 (nanoGPT) and 4.2e-6 (all else); a square
# matrix that is not transposed changes them by more than 1e-2.
TOLERANCE = 2e-5

Arrays = dict[str, np.ndarray]


def hub_weights(vocab: int = V, inner: int = 4 * C, untied: bool = False) -> Arrays:
    """Return random tensors of the hub's layout, without a prefix, the same each time."""
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
    """Return the same with matrices (out, in)."""
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
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return place


def with_buffers(weights: Arrays) -> Arrays:
    """Add what older files contain: a prefix, masks, and a copy of the tied head."""
    old = {f"transformer.{name}": weight for name, weight in weights.items()}
    for i in range(L):
        old[f"transformer.h.{i}.attn.bias"] = np.tri(T, dtype=np.float32).reshape(1, 1, T, T)
        old[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return old | {"lm_head.weight": weights["wte.weight"]}


def bits_of_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 values, rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(weights: Arrays, kind: str) -> Arrays:
    """Return weights rounded to half precision."""
    if kind == "F16":
        return {name: w.astype(np.float16).astype(np.float32) for name, w in weights.items()}
    return {name: (bits_of_bfloat16(w).astype(np.uint32) << 16).view(np.float32) for name, w in weights.items()}


def llmc_bytes(weights: Arrays, version: int = 3, vocab: int = V) -> bytes:
    """Return llm.c's file: header, then kind by kind over all layers, the vocabulary padded to a multiple of 128."""
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
    """Copy TensorFlow's files, with the tokenizer under OpenAI's names."""
    shutil.copytree(TENSORFLOW, place, dirs_exist_ok=True)
    Tokenizer.bytes().save(place / "tokenizer")
    shutil.move(place / "tokenizer" / "vocab.json", place / "encoder.json")
    shutil.move(place / "tokenizer" / "merges.txt", place / "vocab.bpe")
    shutil.rmtree(place / "tokenizer")
    return place


def tensorflow_weights() -> Arrays:
    """Return TensorFlow's values under the hub's names."""
    last = {"g": "weight", "w": "weight", "b": "bias"}
    weights = {}
    for name, value in np.load(TENSORFLOW / "values.npz").items():
        *path, kind = name.removeprefix("model/").replace("h0/", "h/0/").replace("h1/", "h/1/").split("/")
        short = ".".join([*path, last[kind]] if kind in last else [kind, "weight"])
        weights[short] = value[0] if value.ndim == 3 else value
    return weights


PLAIN, WIDE, NARROW = hub_weights(), hub_weights(vocab=384), hub_weights(inner=24)


def error(path: Path, weights: Arrays, **settings: Any) -> float:
    """Return the largest error of a loaded folder's logits against float64."""
    ids = IDS[:, : weights["wpe.weight"].shape[0]]
    expected = gpt2(HubWeights(weights, SETTINGS | settings), ids)
    found = np.array(load(path)[0](ids)).astype(np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())
