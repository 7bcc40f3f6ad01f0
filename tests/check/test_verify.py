"""``verify`` passes a correct model in every layout and setting, and names the layer and tensor of a planted fault."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.make_fixture import FOLDER
from mlx.utils import tree_flatten

from mlx_gpt import device
from mlx_gpt.activations import gelu
from mlx_gpt.check import against_transformers, reference
from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.layers import ULP, compare
from mlx_gpt.check.result import Check
from mlx_gpt.check.verify import as_json, check_devices, verify
from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import sha256_of
from mlx_gpt.model.attention import MultiHeadAttention, attend, merge_heads, split_heads
from mlx_gpt.model.block import Block
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, read_model, save
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

TOY = GPTConfig(vocab_size=257, n_positions=40, n_embd=32, n_layer=3, n_head=4)
IDS = np.random.default_rng(0).integers(0, 257, 40)


def a_model(**settings: Any) -> GPT:
    """A model with random weights only: no bias is 0, no layer norm is 1."""
    mx.random.seed(0)
    model = GPT(replace(TOY, **settings))
    weights: Any = tree_flatten(model.parameters())
    model.load_weights([(name, weight + mx.random.normal(weight.shape, scale=0.2)) for name, weight in weights])
    return model.eval()


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "parity" not in request.keywords:
        monkeypatch.setattr(against_transformers, "find_spec", lambda name: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(a_model(), Tokenizer.bytes(), tmp_path / "toy")
    return tmp_path / "toy"


def checks(folder: Path, fault: Callable[[GPT], None] = lambda model: None, **options: Any) -> dict[str, Check]:
    """Run verify on a folder with a fault planted in the loaded model; checks by name."""
    model, tokenizer = load(folder)
    fault(model)
    return {check.what: check for check in verify(model, options.pop("tokenizer", tokenizer), folder, **options)}


def wrong(report: dict[str, Check]) -> list[str]:
    return [what for what, check in report.items() if check.holds is False]


def with_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


# A correct model


def test_a_correct_model_passes_every_check(folder: Path) -> None:
    report = checks(folder)
    assert wrong(report) == []
    assert {what for what, check in report.items() if check.holds is None} == {
        "GPU against CPU" if on_cpu() else "",
        "against transformers",
        "checksum of the weights",
        "published values",
    } - {""}
    assert [what for what in report if what.startswith("float64: logits")] == [
        "float64: logits, one token (1)",
        "float64: logits, a text (32)",
        "float64: logits, random tokens (40)",
        "float64: logits, a long text (40)",  # the full context
    ]


SETTINGS: list[dict[str, Any]] = [
    {"activation_function": "gelu"},
    {"n_inner": 48},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
    {"layer_norm_epsilon": 1e-3},
    {"vocab_size": 320},  # padded
    {"n_positions": 2},
    {"n_positions": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_correct_model_passes_in_every_setting(tmp_path: Path, settings: dict[str, Any]) -> None:
    save(a_model(**settings), Tokenizer.bytes(), tmp_path)
    assert wrong(checks(tmp_path)) == []


def prefixed(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"transformer.{name}": weight for name, weight in weights.items()})


def with_masks(folder: Path) -> None:
    mask = mx.tril(mx.ones((1, 1, 40, 40)))
    masks = {f"h.{i}.attn.bias": mask for i in range(3)} | {f"h.{i}.attn.masked_bias": mx.array(-1e4) for i in range(3)}
    rewrite(folder, lambda weights: weights | masks)


def with_a_copied_head(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"lm_head.weight": weights["wte.weight"]})


def sharded(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in names if names[name] == file})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def as_dtype(dtype: mx.Dtype) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: {name: w.astype(dtype) for name, w in weights.items()})


def with_other_names(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    for name, other in {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}.items():
        text = text.replace(f'"{name}"', f'"{other}"')
    (folder / "config.json").write_text(text)


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    weights = change(dict(mx.load(str(folder / "model.safetensors"))))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


LAYOUTS = [
    prefixed,
    with_masks,
    with_a_copied_head,
    sharded,
    as_dtype(mx.float16),
    as_dtype(mx.bfloat16),
    with_other_names,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__qualname__)
def test_a_correct_model_passes_in_every_layout_of_the_hub(folder: Path, layout: Callable[[Path], None]) -> None:
    layout(folder)
    assert wrong(checks(folder)) == []


def test_the_tolerance_is_a_small_multiple_of_float32s_rounding() -> None:
    """Measured on the stored model: a fault exceeds it, and rounding does not come near it."""
    comparison = compare(read_model(FOLDER), HubFolder(FOLDER), np.load(FOLDER / "logits.npz")["ids"][0])
    shares = [tensor.share for tensor in comparison.tensors]
    print(f"largest share of the tolerance {max(shares):.2f}, largest tolerance {comparison.logits.tolerance:.1e}")
    assert max(shares) < 0.5
    assert 16 * ULP < max(tensor.tolerance for tensor in comparison.tensors) < 1000 * ULP


# Planted faults


def change_weight(name: str, how: Callable[[mx.array], mx.array]) -> Callable[[GPT], None]:
    def plant(model: GPT) -> None:
        weights: Any = dict(tree_flatten(model.parameters()))
        model.load_weights([(name, how(weights[name]))], strict=False)

    return plant


def swapped(weight: mx.array) -> mx.array:
    q, k, v = mx.split(weight, 3)
    return mx.concatenate([k, q, v])


def other_epsilon(model: GPT) -> None:
    model.h[0].ln_1.eps = 1e-6


def exact_gelu(model: GPT) -> None:
    model.h[0].mlp.activation = gelu


def positions_off_by_one(model: GPT) -> None:
    P = model.config.n_positions
    model._positions = lambda T, cache: mx.minimum(mx.arange(1, T + 1), P - 1)


def wrong_scale(model: GPT) -> None:
    model.h[2].attn.scale *= 1.001


def wrong_heads(model: GPT) -> None:
    model.h[1].attn.n_head = 8


class Unmasked(MultiHeadAttention):
    """Attention without the causal mask."""

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        q, k, v = mx.split(split_heads(self.c_attn(x), 3 * self.n_head), 3, axis=1)
        attended = merge_heads(mx.softmax(q @ k.swapaxes(-1, -2) * self.scale, axis=-1) @ v)
        return self.c_proj(attended.reshape(x.shape))


class PostNorm(Block):
    """Layer norms after attention and MLP, as in the first GPT."""

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        x = self.ln_1(x + self.attn(x, cache))
        return self.ln_2(x + self.mlp(x))


def no_mask(model: GPT) -> None:
    model.h[1].attn.__class__ = Unmasked


def post_norm(model: GPT) -> None:
    model.h[2].__class__ = PostNorm


def other_final_epsilon(model: GPT) -> None:
    model.ln_f.eps = 1e-3


FAULTS: dict[str, tuple[Callable[[GPT], None], str]] = {
    "a square matrix transposed": (change_weight("h.1.attn.c_proj.weight", mx.transpose), "h.1.attn.c_proj"),
    "queries and keys swapped": (change_weight("h.0.attn.c_attn.weight", swapped), "h.0.attn.q"),
    "a bias dropped": (change_weight("h.2.mlp.c_fc.bias", mx.zeros_like), "h.2.mlp.c_fc"),
    "the bias of an output dropped": (change_weight("h.1.attn.c_proj.bias", mx.zeros_like), "h.1.attn.c_proj"),
    "another epsilon": (other_epsilon, "h.0.ln_1"),
    "another epsilon in the final norm": (other_final_epsilon, "ln_f"),
    "exact GELU instead of tanh": (exact_gelu, "h.0.mlp.activation"),
    "positions off by one": (positions_off_by_one, "wte + wpe"),
    "scale of the scores wrong by a thousandth": (wrong_scale, "h.2.attn.pattern"),
    "heads split at the wrong places": (wrong_heads, "h.1.attn.pattern"),
    "no causal mask": (no_mask, "h.1.attn.c_proj"),
    "layer norms after instead of before": (post_norm, "h.2.resid_post"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_by_layer_and_tensor(folder: Path, fault: str) -> None:
    plant, tensor = FAULTS[fault]
    report = checks(folder, plant)
    line = report["float64: layer by layer, random tokens (40)"]
    assert line.holds is False
    assert line.remark.startswith(f"first wrong: {tensor}, at token")
    assert "float64: logits, random tokens (40)" in wrong(report) or fault == "another epsilon"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_does_not_propagate_to_later_blocks(folder: Path, fault: str) -> None:
    plant, tensor = FAULTS[fault]
    model = read_model(folder)
    plant(model)
    found = [one.name for one in compare(model, HubFolder(folder), IDS).tensors if one.share > 1]
    assert found[0] == tensor
    assert len({name.split(".")[1] if name.startswith("h.") else "" for name in found}) == 1


def test_a_changed_weight_is_named_even_if_no_prompt_uses_it(folder: Path) -> None:
    report = checks(folder, change_weight("wpe.weight", lambda w: w.at[39, 0].add(1e-6)), tokens=8)
    assert wrong(report) == ["weights that differ from the files"]
    assert report["weights that differ from the files"].remark == "first: wpe.weight"


def test_nan_never_passes(folder: Path) -> None:
    report = checks(folder, change_weight("h.1.mlp.c_proj.bias", lambda w: w.at[0].add(mx.nan)))
    assert report["weights with NaN or infinity"].remark == "first: h.1.mlp.c_proj.bias"
    assert {"logits with NaN or infinity", "logits with a cache against without"} <= set(wrong(report))
    assert "first wrong: h.1.mlp.c_proj" in report["float64: layer by layer, one token (1)"].remark
    assert {"figure": None, "holds": False}.items() <= json.loads(as_json(list(report.values())))[3].items()


# Structure


def test_a_model_that_sees_later_tokens_fails(folder: Path) -> None:
    assert "effect of later tokens on earlier logits" in wrong(checks(folder, no_mask))


def test_a_cache_with_wrong_positions_fails(folder: Path) -> None:
    def restarting(model: GPT) -> None:
        model._positions = lambda T, cache: mx.arange(T)

    report = checks(folder, restarting)
    assert wrong(report) == ["logits with a cache against without"]


def test_a_tokenizer_of_another_model_fails(folder: Path) -> None:
    longer = Tokenizer.train(["the old lighthouse, the old keeper, the old lamp " * 20], 280)
    report = checks(folder, tokenizer=longer)
    assert wrong(report) == ["ids of the tokenizer past the vocabulary", "end-of-text id"]
    assert report["end-of-text id"].remark == "config.json: 256, tokenizer: 279"


def test_an_untied_head_that_should_be_tied_fails(folder: Path) -> None:
    untied = a_model(tie_word_embeddings=False)
    report = {check.what: check for check in verify(untied, Tokenizer.bytes(), folder)}
    assert "config.json says wte.weight" in report["head tied as in config.json"].remark
    assert "head tied as in config.json" in wrong(report)


@pytest.mark.parametrize(("noise", "holds"), [(0.0, True), (1e-6, True), (1e-3, False), (np.nan, False)])
def test_a_gpu_that_differs_from_the_cpu_fails(noise: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU: logits have noise unless the CPU stream is in use."""
    model, streams = a_model(), ["gpu"]

    @contextmanager
    def stream(device: Any) -> Iterator[None]:
        streams.append(device)
        yield
        streams.pop()

    def computed(ids: Any) -> mx.array:
        logits = model(ids)
        return logits if streams[-1] == mx.cpu else logits + noise * mx.abs(logits).max()

    monkeypatch.setattr("mlx_gpt.check.verify.on_cpu", lambda: False)
    monkeypatch.setattr(mx, "stream", stream)
    check = check_devices(computed, IDS, tolerance=1e-5)  # type: ignore[arg-type]
    assert check.holds is holds
    assert check.figure == pytest.approx(noise, rel=1, abs=1e-6, nan_ok=True)
    assert streams == ["gpu"]


def test_attend_equals_the_fused_kernel(folder: Path) -> None:
    """So ``attn.attended``, computed by ``attend``'s functions, covers the kernel that the model calls."""
    q = k = v = mx.random.normal((1, 2, 8, 4))
    fused = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal")
    assert mx.allclose(attend(q, k, v, 0.5), fused, atol=1e-6)


# The command


def output(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    out, err = capsys.readouterr()
    return out, err.strip().splitlines()[-1] if err.strip() else ""


def test_the_command_reports_and_returns_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    out, err = output(capsys)
    assert "float64: layer by layer, a long text (40)" in out
    assert "not installed" in out
    assert err == ""


def test_the_command_names_the_failed_check_and_returns_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": 3}))
    assert main(["verify", str(folder), "--tokens", "4", "--json"]) == 1
    out, err = output(capsys)
    lines = json.loads(out)
    assert [line["what"] for line in lines if line["holds"] is False] == ["end-of-text id"]
    assert err.endswith(f"1 of {len(lines)} checks fail, first: end-of-text id; config.json: 3, tokenizer: 256")


def test_a_model_of_the_hub_is_identified_by_its_id_and_checked_by_its_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the cache, through the real hub client, which names each large file by its SHA-256."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--someone--toy"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "blobs").mkdir()
    weights = cached / "snapshots" / "abc" / "model.safetensors"
    blob = cached / "blobs" / sha256_of(weights)
    shutil.move(weights, blob)
    weights.symlink_to(blob)
    assert main(["verify", "someone/toy", "--tokens", "4"]) == 0
    out, _ = output(capsys)
    assert f"sha256 {blob.name[:12]}…" in out
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert main(["verify", "someone/toy", "--tokens", "4"]) == 1
    _, err = output(capsys)
    assert "checksum of the weights is 1, tolerance 0; model.safetensors: expected sha256" in err


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["{}/nowhere/at/all"], 1, "no such folder"),
        (["{}", "--tokens", "0"], 2, "--tokens must be at least 1, not 0"),
        (["{}", "--known-as", "gpt3"], 2, "--known-as must be one of distilgpt2, gpt2, gpt2-large"),
        (["{}/vocab.json"], 1, "expected a model folder or a file of weights"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, line: str
) -> None:
    assert main(["verify", *(flag.format(folder) for flag in flags)]) == code
    _, err = capsys.readouterr()
    assert line in err
    assert len(err.splitlines()) == 1


def test_weights_that_are_not_floats_are_reported_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda weights: weights | {"h.0.mlp.c_fc.weight": mx.zeros((32, 128), mx.uint32)})
    assert main(["verify", str(folder)]) == 1
    _, err = capsys.readouterr()
    assert "h.0.mlp.c_fc.weight" in err
    assert len(err.splitlines()) == 1


def test_the_reference_refuses_quantized_weights(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"h.0.mlp.c_fc.weight": mx.zeros((32, 16), mx.uint32)})
    with pytest.raises(ModelFolderError, match="found U32; verify the float model that a quantized one was made from"):
        HubFolder(folder).read("h.0.mlp.c_fc.weight")


def test_the_reference_refuses_a_folder_without_safetensors(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ModelFolderError, match=r"expected model\.safetensors to check the model against"):
        HubFolder(tmp_path)


def test_a_float_model_whose_config_says_quantized_passes(folder: Path) -> None:
    with_config(folder, quantization={"group_size": 64, "bits": 4})
    assert wrong(checks(folder)) == []


@pytest.mark.parametrize("characters", ["\n !ABCabc", "世界"])
def test_a_model_of_nanogpts_characters_passes(tmp_path: Path, characters: str) -> None:
    tokenizer = CharacterTokenizer({c: i for i, c in enumerate(characters)})
    save(a_model(vocab_size=len(characters)), tokenizer, tmp_path)
    assert wrong(checks(tmp_path)) == []


# Against transformers


@pytest.mark.parity
def test_transformers_agrees_with_a_correct_model(folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report = checks(folder)
    assert wrong(report) == []
    rows = [what for what in report if what.startswith("transformers: ")]
    assert rows == [
        "transformers: logits, 40 tokens",
        "transformers: greedy, up to 32 tokens",
        "transformers: gradients",
    ]


@pytest.mark.parity
def test_transformers_agrees_with_a_model_whose_scores_it_would_upcast(folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with_config(folder, reorder_and_upcast_attn=True)
    report = checks(folder)
    assert wrong(report) == []
    assert "transformers: logits, 40 tokens" in report


@pytest.mark.parity
@pytest.mark.parametrize("part", ["logits", "greedy", "gradients"])
def test_a_failure_inside_transformers_is_a_failed_check(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def fail(*given: Any) -> None:
        raise RuntimeError("matrices\nof another kind")

    monkeypatch.setattr(against_transformers, f"check_{part}", fail)
    report = checks(folder)
    assert wrong(report) == [f"transformers: {part}"]
    assert report[f"transformers: {part}"].remark == "it does not compute this model: RuntimeError: matrices"


@pytest.mark.parity
@pytest.mark.parametrize("settings", SETTINGS[:7], ids=str)
def test_transformers_agrees_in_every_setting(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    save(a_model(**settings), Tokenizer.bytes(), tmp_path)
    assert wrong(checks(tmp_path)) == []


@pytest.mark.parity
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "epsilon" not in fault])
def test_a_fault_shows_in_the_logits_and_gradients_against_transformers(folder: Path, fault: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report = checks(folder, FAULTS[fault][0])
    assert {"transformers: logits, 40 tokens", "transformers: gradients"} <= set(wrong(report))


@pytest.mark.parity
def test_a_fault_shows_in_the_greedy_text_against_transformers(folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report = checks(folder, FAULTS["positions off by one"][0])
    line = report["transformers: greedy, up to 32 tokens"]
    assert line.holds is False
    assert "theirs" in line.remark


@pytest.mark.parametrize("has_tools", [True, False])
def test_no_compiler_is_asked_for_on_a_mac_without_one(has_tools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would open a dialog that offers to install one."""
    calls: list[str] = []
    monkeypatch.setattr(device.sys, "platform", "darwin")
    monkeypatch.setattr(device, "XCODE_SELECT", shutil.which("true" if has_tools else "false"))
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("disable"))
    monkeypatch.setattr(mx, "enable_compile", lambda: calls.append("enable"))
    with pytest.raises(KeyError), device.without_compiler_dialog():
        raise KeyError
    assert calls == ([] if has_tools else ["disable", "enable"])


def test_the_reference_prints_no_warnings_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(*_: object) -> np.ndarray:
        return np.array([[np.inf, -np.inf]])  # as the flags that some products leave on Apple silicon

    monkeypatch.setattr(reference, "norm", norm)
    weights = SimpleNamespace(settings={"layer_norm_epsilon": 1e-5}, read=lambda *_: np.zeros((2, 2)), head="wte")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.head(np.zeros((1, 2)), weights, np.float64)  # type: ignore[arg-type]
