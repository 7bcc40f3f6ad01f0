"""Pickles: nanoGPT's checkpoints and ``pytorch_model.bin``, read and written with torch; no code in them runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.layout_files import (
    IDS,
    PLAIN,
    SETTINGS,
    TOLERANCE,
    C,
    H,
    L,
    T,
    V,
    error,
    rounded,
    with_buffers,
    write_hub,
)

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer


def torch_gpt(config: dict[str, Any], exact: bool = True) -> Any:
    """Return a torch model whose parameters have nanoGPT's names and shapes."""
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
    convert(find_source(tmp_path / "ckpt.pt"), tmp_path / "dest")
    convert(find_source(tmp_path), tmp_path / "again")  # nanoGPT's folder
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
    model.load_state_dict(checkpoint["model"])  # strict: exactly these names
    with torch.no_grad():
        found = model(torch.tensor(IDS)).numpy()
    settings = SETTINGS | {"activation_function": "gelu" if exact else "gelu_new"}
    expected = gpt2(HubWeights(PLAIN, settings), IDS)
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
    load(path)  # directly
    convert(find_source(path), tmp_path / "dest")
    off = error(tmp_path / "dest", expected)
    print(f"pytorch_model.bin, {case}: off by {off:.1e}")
    assert off < TOLERANCE


class Malicious:
    """An object whose pickle creates a file when it is opened naively."""

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
        find_source(source / name)
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
        find_source(tmp_path / "ckpt.pt")
    assert message in str(refusal.value)


def test_without_torch_a_pickle_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ModelFolderError, match=r"takes torch to read or write: pip install 'torch>=2\.6'"):
        find_source(tmp_path / "ckpt.pt")
    write_hub(tmp_path / "hub", PLAIN)
    with pytest.raises(ModelFolderError, match=rf"^{tmp_path / 'x.pt'}: .* takes torch to read or write"):
        export(find_source(tmp_path / "hub"), tmp_path / "x.pt", "nanogpt")
    assert not list(tmp_path.glob("*x.pt*"))


def test_a_torch_that_opens_pickles_unsafely_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    sys.modules["torch"].__version__ = "2.5.1+cpu"  # type: ignore[attr-defined]
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(ModelFolderError, match=r"torch 2\.5\.1\+cpu does not open a pickle safely"):
        find_source(tmp_path / "ckpt.pt")
