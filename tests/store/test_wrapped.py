"""Checkpoints as training frameworks wrap and name them compute what the model inside computes, or are refused."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
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
    Arrays,
    C,
    H,
    L,
    T,
    V,
    error,
    linear,
    write_hub,
    write_safetensors,
)

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import bare_names
from mlx_gpt.store.folder import convert, load
from mlx_gpt.store.layouts import find_source
from mlx_gpt.store.safetensors import safetensors_header
from mlx_gpt.text.tokenizer import Tokenizer

SIZES = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V}
HEAD_ONLY = {name: w for name, w in PLAIN.items() if name != "wte.weight"} | {"lm_head.weight": PLAIN["wte.weight"]}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "transformer.",
        "module.",
        "_orig_mod.",
        "module._orig_mod.transformer.",
        "_orig_mod.module.transformer.",
        "_forward_module.model.",
        "model.transformer.",
        "_fsdp_wrapped_module.transformer.",
        "net.gpt.",
    ],
)
@pytest.mark.parametrize("inside", ["", "_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_prefixes_are_removed_in_any_order(prefix: str, inside: str) -> None:
    names = [f"{prefix}wpe.weight", f"{prefix}h.3.{inside}attn.c_attn.bias", f"{prefix}ln_f.weight"]
    names.append(f"{prefix.removesuffix('transformer.')}lm_head.weight")
    assert list(bare_names(names).values()) == ["wpe.weight", "h.3.attn.c_attn.bias", "ln_f.weight", "lm_head.weight"]


@pytest.mark.parametrize("extra", ["ema.module.", "ema_model.", "teacher.transformer."])
def test_two_models_under_two_prefixes_are_refused_by_name(extra: str) -> None:
    with pytest.raises(ModelFolderError, match="this file mixes two models") as refusal:
        bare_names(["model.wpe.weight", f"{extra}wpe.weight"])
    assert repr(extra.replace("module.", "")) in str(refusal.value)


@pytest.mark.parametrize("weights", [PLAIN, linear(PLAIN)], ids=["in, out", "out, in"])
@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.transformer.", "module.model."])
def test_a_folder_opens_whichever_way_its_matrices_lie(tmp_path: Path, prefix: str, weights: Arrays) -> None:
    assert error(write_hub(tmp_path, {prefix + name: w for name, w in weights.items()}), PLAIN) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_head_alone_of_a_tied_pair_is_the_embedding(tmp_path: Path, prefix: str, sharded: bool) -> None:
    weights = {f"{'' if 'lm_head' in name else prefix}{name}": w for name, w in HEAD_ONLY.items()}
    write_hub(tmp_path, weights)
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        index = {name: f"{'a' if 'lm_head' in name else 'b'}.safetensors" for name in weights}
        for file in set(index.values()):
            write_safetensors(tmp_path / file, {name: w for name, w in weights.items() if index[name] == file})
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert error(tmp_path, PLAIN) < TOLERANCE


def test_a_name_in_the_metadata_is_the_tensor_that_was_kept(tmp_path: Path) -> None:
    write_hub(tmp_path, HEAD_ONLY, tie_word_embeddings=False)
    entries = {name: ("F32", w.shape, w.nbytes) for name, w in HEAD_ONLY.items()}
    header = safetensors_header(entries, {"format": "pt", "wte.weight": "lm_head.weight"})
    (tmp_path / "model.safetensors").write_bytes(header + b"".join(w.tobytes() for w in HEAD_ONLY.values()))
    assert error(tmp_path, PLAIN) < TOLERANCE


# Pickles --------------------------------------------------------------------------------------------------------------


def state(weights: Arrays = PLAIN, prefix: str = "transformer.") -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {f"{prefix}{name}": torch.from_numpy(weight) for name, weight in weights.items()}


def converted(content: Any, place: Path, name: str = "x.pt", **settings: Any) -> float:
    """Save a checkpoint, convert it, and return the error of its logits; ``settings`` are a config.json beside it."""
    torch = pytest.importorskip("torch")
    Tokenizer.bytes().save(place)
    (place / name).parent.mkdir(exist_ok=True)
    if settings:
        (place / "config.json").write_text(json.dumps(settings))
    torch.save(content, place / name)
    convert(find_source(place / name), place / "dest")
    activation = json.loads((place / "dest" / "config.json").read_text())["activation_function"]
    expected = gpt2(HubWeights(PLAIN, SETTINGS | {"activation_function": activation}), IDS)
    return float(np.abs(np.array(load(place / "dest")[0](IDS)) - expected).max())


WRAPPED: dict[str, Callable[[], Any]] = {
    "bare": state,
    "Lightning": lambda: {"epoch": 1, "state_dict": state(prefix="model.transformer."), "optimizer_states": [{}]},
    "model_state_dict": lambda: {"model_state_dict": state(), "optimizer_state_dict": {"state": {0: {}}}, "loss": 1.5},
    "DeepSpeed": lambda: {"module": state(prefix="module.transformer."), "ds_version": "0.15", "optimizer": None},
    "nested": lambda: {"checkpoint": {"model": state(prefix="_orig_mod.")}, "args": argparse.Namespace(lr=1e-3)},
    "NumPy numbers": lambda: {
        "state_dict": state(),
        "loss": np.float64(1.5),
        "history": np.zeros(3),
        "path": Path("x"),
    },
    "an averaged model": lambda: {"state_dict": state(prefix="module.") | {"n_averaged": _tensor(3)}},
    "the head of a tied pair": lambda: {"model": state(HEAD_ONLY, prefix="")},
}


def _tensor(value: Any) -> Any:
    return pytest.importorskip("torch").tensor(value)


@pytest.mark.parity
@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("name", ["x.pt", "x"])
def test_a_wrapped_state_dict_is_found(tmp_path: Path, case: str, name: str) -> None:
    assert converted(WRAPPED[case](), tmp_path, name, **SETTINGS) < TOLERANCE


@pytest.mark.parity
def test_settings_in_the_checkpoint_replace_a_config_json(tmp_path: Path) -> None:
    linears = state(linear(PLAIN))
    cases = [
        {"state_dict": state(), "hyper_parameters": {"lr": 1e-3, "config": SIZES}},
        {"state_dict": linears, "hyper_parameters": {"n_head": H, "activation_function": "gelu", **SIZES}},
        {"model": linears, "model_args": SIZES},  # build-nanogpt's configuration: the tanh form
        {"model": linears, "args": argparse.Namespace(**SIZES, activation_function="gelu_new")},
    ]
    for k, content in enumerate(cases):
        assert converted(content, tmp_path / str(k)) < TOLERANCE
    saved = [json.loads((tmp_path / str(k) / "dest" / "config.json").read_text()) for k in range(4)]
    assert [config["activation_function"] for config in saved] == ["gelu_new", "gelu", "gelu_new", "gelu_new"]


@pytest.mark.parity
def test_what_shapes_do_not_tell_is_asked_for_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError) as refusal:
        converted(state(), tmp_path)
    assert "expected n_head in it or in a config.json beside it" in str(refusal.value)
    text = str(refusal.value).partition("config.json: ")[2]
    assert json.loads(text) == SETTINGS | {"n_head": "N", "activation_function": "gelu_new"}
    with pytest.raises(ModelFolderError, match="expected n_head and activation_function in it"):
        converted(state(linear(PLAIN)), tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "module.transformer."])
def test_a_model_without_biases_has_biases_of_zero(tmp_path: Path, prefix: str) -> None:
    weights = {name: w * (not name.endswith(".bias")) for name, w in linear(PLAIN).items()}
    some = {name: w for name, w in weights.items() if not name.endswith(".bias")}
    torch = pytest.importorskip("torch")
    for name, saved in {"all.pt": weights, "some.pt": some}.items():
        torch.save({"model": state(saved, prefix), "model_args": SIZES | {"bias": False}}, tmp_path / name)
    all_, some_ = (find_source(tmp_path / name).parameters() for name in ("all.pt", "some.pt"))
    assert all_.keys() == some_.keys()
    assert all(mx.array_equal(all_[name], some_[name]) for name in all_)


@pytest.mark.parity
def test_a_deepspeed_folder_is_read_through_latest(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_hub(tmp_path, PLAIN)
    (tmp_path / "model.safetensors").unlink()
    for step, weights in (("global_step1", {n: 0 * w for n, w in PLAIN.items()}), ("global_step2", PLAIN)):
        (tmp_path / step).mkdir()
        torch.save({"module": state(weights)}, tmp_path / step / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step2\n")
    for k, path in enumerate((tmp_path, tmp_path / "global_step2", next((tmp_path / "global_step2").iterdir()))):
        convert(find_source(path), tmp_path / f"dest{k}")
        assert error(tmp_path / f"dest{k}", PLAIN) < TOLERANCE
    part = tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    next((tmp_path / "global_step2").iterdir()).rename(part)
    for path in (tmp_path, part):
        with pytest.raises(ModelFolderError, match=r"ZeRO-3.*run the zero_to_fp32\.py beside"):
            find_source(path)


def refused(content: Callable[[Any], Any], file: Path, **options: Any) -> str:
    torch = pytest.importorskip("torch")
    torch.save(content(torch), file, **options)
    with pytest.raises(ModelFolderError) as refusal:
        find_source(file)
    assert str(refusal.value).isprintable()
    return str(refusal.value)


def within_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content.update({str(i): content for i in range(200)})
    return content


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "FSDP": (lambda t: {"model": {"_fsdp_wrapped_module._flat_param": t.zeros(9)}}, "FULL_STATE_DICT"),
    "ZeRO-3": (lambda t: {"module": {"wpe.weight": t.zeros(0)}}, "run the zero_to_fp32.py"),
    "two models": (lambda t: {"model": state(), "ema": state()}, "found 2, in model and ema"),
    "no model": (
        lambda t: {"state": {}, "param_groups": [1]},
        "found 'state', 'param_groups'; save model.state_dict()",
    ),
    "a list": (lambda t: [t.zeros(3)], "found no dict"),
    "an int as a name": (lambda t: {1: t.zeros(1), **state()}, "expected the names of tensors, found 1"),
    "sparse": (lambda t: {"wpe.weight": t.eye(3).to_sparse()}, "found a sparse_coo tensor"),
    "meta": (lambda t: {"wpe.weight": t.zeros(3, 3, device="meta")}, "without values, on the device meta"),
    "complex": (lambda t: {"wpe.weight": t.zeros(3, 3, dtype=t.complex64)}, "found complex64"),
    "integers": (lambda t: {"wpe.weight": t.zeros(3, 3, dtype=t.int64)}, "found int64"),
    "quantized": (lambda t: {"wpe.weight": t.quantize_per_tensor(t.ones(3, 3), 0.1, 0, t.qint8)}, "found qint8"),
    "no tensor": (lambda t: {"wpe.weight": t.zeros(3, 3), "x": 5}, "x: expected a dense tensor"),
    "a dict inside itself": (lambda t: within_itself(), "found '0', '1', '2'"),
    "a tensor as a key": (lambda t: {t.zeros(1): 1}, "found a key of type Tensor"),
    "float64": (lambda t: {"wpe.weight": t.zeros(3, 3).double()}, "found float64"),
    "many views": (
        lambda t: {"wpe.weight": t.zeros(1), **{str(i): t.zeros(1).expand(400) for i in range(100)}},
        "damaged or malicious",
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>", "a file that begins with b'<!DOCTYPE ht'"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        (pickle.dumps({"wpe.weight": np.zeros((3, 3))}), "a pickle of another protocol than torch.save's own, 2"),
        (b"PK\x03\x04 cut", "no directory at its end"),
    ],
)
def test_a_file_that_torch_did_not_write_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("torch")
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelFolderError) as refusal:
        find_source(tmp_path / "x.pt")
    assert message in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parity
def test_torchs_advice_to_run_the_code_in_a_pickle_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")

    def refuse(*_: Any, **__: Any) -> None:
        raise pickle.UnpicklingError("Weights only load failed. Setting weights_only=False will likely succeed")

    torch.save({}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ModelFolderError, match="a pickle that it does not read as data, or a damaged one") as refusal:
        find_source(tmp_path / "x.pt")
    assert "weights_only" not in str(refusal.value)


def test_a_checkpoint_of_torch_distributed_is_refused_with_the_command_that_merges_it(tmp_path: Path) -> None:
    write_hub(tmp_path, PLAIN)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"PK\x03\x04")
    for path in (tmp_path, tmp_path / "pytorch_model_fsdp_0"):
        with pytest.raises(ModelFolderError, match=r"dcp_to_torch .*pytorch_model_fsdp_0 model\.pt"):
            find_source(path)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_other_content_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    assert message in refused(content, tmp_path / "x.pt")


class GPTConfig:
    block_size = 64


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_class_is_named_whole_with_the_remedy(tmp_path: Path, zipped: bool) -> None:
    message = refused(
        lambda t: {"model": state(), "config": GPTConfig()},
        tmp_path / "model_00005.pt",
        _use_new_zipfile_serialization=zipped,
    )
    assert f"holds objects of {GPTConfig.__module__}.GPTConfig, whose code" in message
    assert '"model_args": vars(model.config)' in message
    assert "x1b" not in message
