"""Our logits equal those of the float64 reference, of transformers (stored, and if installed live) and of mlx-lm.

The measurements behind the tolerances are printed by ``pytest -s tests/check/test_parity.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.make_fixture import FOLDER, VARIANTS, logits_of, tiny_gpt2
from mlx.utils import tree_flatten

from mlx_gpt.check.hub_folder import HubFolder, HubWeights
from mlx_gpt.check.reference import block as reference_block
from mlx_gpt.check.reference import embed, gpt2
from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.convert import from_hub, hub_shapes, to_hub
from mlx_gpt.store.folder import load, read_model, save
from mlx_gpt.text.tokenizer import Tokenizer

# Logits here reach 7. In float32 our largest error is 5.4e-6 and transformers' is 3.8e-6 (CPU, measured). The smallest
# effect of a mistake below is 1e-3.
TOLERANCE = 1.5e-5

STORED = dict(np.load(FOLDER / "logits.npz"))
IDS = STORED["ids"]  # (2, 24), all positions
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
WEIGHTS: dict[str, np.ndarray] = {
    name: np.array(weight) for name, weight in mx.load(str(FOLDER / "model.safetensors")).items()
}


def ours(weights: dict[str, np.ndarray], config: GPTConfig, ids: np.ndarray = IDS) -> np.ndarray:
    """Return the logits of our model with the weights of a hub checkpoint."""
    model = GPT(config)
    model.load_weights(list(from_hub({name: mx.array(weight) for name, weight in weights.items()}, config).items()))
    return np.array(model.eval()(ids))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two logits."""
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float64) - expected).max())


@pytest.fixture(scope="module")
def config() -> GPTConfig:
    return read_model(FOLDER).config


def reference(weights: dict[str, np.ndarray] = WEIGHTS, **settings: Any) -> np.ndarray:
    """Return float64 logits for IDS."""
    return gpt2(HubWeights(weights, CONFIG | settings), IDS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_gives_the_stored_float64_logits_of_transformers(variant: str) -> None:
    folder = HubFolder(FOLDER)  # the reference's own reader
    folder.settings |= VARIANTS[variant]
    stored = STORED[variant]  # "plain" is stored in float64, the others rounded to float32
    assert error(gpt2(folder, IDS), stored) < (1e-12 if variant == "plain" else 5e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_the_float64_reference(config: GPTConfig, variant: str) -> None:
    expected = reference(**VARIANTS[variant])
    off = error(ours(WEIGHTS, replace(config, **VARIANTS[variant])), expected)
    print(f"tiny-gpt2, {variant}: error {off:.1e}, largest logit {np.abs(expected).max():.1f}")
    assert off < TOLERANCE


def test_a_loaded_folder_gives_the_stored_logits_of_transformers() -> None:
    logits = np.array(read_model(FOLDER)(IDS))
    assert error(logits, STORED["plain_float32"]) < TOLERANCE
    assert error(logits, STORED["plain"]) < 2 * error(STORED["plain_float32"], STORED["plain"])


def test_the_residual_stream_agrees_with_the_reference_after_every_block() -> None:
    model, weights = read_model(FOLDER), HubWeights(WEIGHTS, CONFIG)
    x = model.wte(mx.array(IDS)) + model.wpe(mx.arange(IDS.shape[1]))
    expected = embed(weights, IDS)
    assert error(np.array(x), expected) < 1e-6
    for i, block in enumerate(model.h):
        x = block(x)
        expected = reference_block(expected, weights.block(i), weights.settings, i)["resid_post"]
        assert error(np.array(x), expected) < 3e-5, f"first wrong in block {i}"  # values reach 26


def transposed(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda weights: weights | {name: weights[name].T}


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    neutral = np.ones_like if name.endswith("weight") else np.zeros_like
    return lambda weights: weights | {name: neutral(weights[name])}


def swapped(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    q, k, v = np.split(weights["transformer.h.0.attn.c_attn.weight"], 3, axis=1)
    return weights | {"transformer.h.0.attn.c_attn.weight": np.concatenate([k, q, v], axis=1)}


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]] = {
    "the square attn.c_proj not transposed": ({}, transposed("transformer.h.1.attn.c_proj.weight")),
    "queries and keys exchanged": ({}, swapped),
    "the bias of an output left out": ({}, without("transformer.h.2.attn.c_proj.bias")),
    "the bias of c_attn left out": ({}, without("transformer.h.0.attn.c_attn.bias")),
    "the scale of a norm left out": ({}, without("transformer.h.0.ln_2.weight")),
    "the shift of the last norm left out": ({}, without("transformer.ln_f.bias")),
    "heads split at the wrong places": ({"n_head": 8}, dict),
    "the other GELU": ({"activation_function": "gelu"}, dict),
    "scores divided by the layer": ({"scale_attn_by_inverse_layer_idx": True}, dict),
    "scores not scaled": ({"scale_attn_weights": False}, dict),
    "another epsilon": ({"layer_norm_epsilon": 1e-3}, dict),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_correct_shapes_shows_in_the_logits(config: GPTConfig, mistake: str) -> None:
    settings, corrupt = MISTAKES[mistake]
    off = error(ours(corrupt(WEIGHTS), replace(config, **settings)), STORED["plain"])
    print(f"{mistake}: error {off:.1e}")
    assert off > 50 * TOLERANCE


def test_half_precision_files_are_computed_in_float32(config: GPTConfig) -> None:
    halved = {name: mx.array(weight).astype(mx.float16) for name, weight in WEIGHTS.items()}
    rounded = {name: np.array(weight.astype(mx.float32)) for name, weight in halved.items()}
    model = GPT(config)
    model.load_weights(list(from_hub(halved, config).items()))
    assert error(np.array(model.eval()(IDS)), reference(rounded)) < TOLERANCE


# With torch and transformers.


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu"},
        {"n_inner": 48},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-3},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_a_model_saved_by_transformers_loads_with_the_same_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = tiny_gpt2(**settings)
    theirs.save_pretrained(tmp_path)
    logits = np.array(read_model(tmp_path)(IDS))
    weights = {name: weight.detach().numpy().copy() for name, weight in theirs.named_parameters()}
    expected = gpt2(HubWeights(weights, json.loads((tmp_path / "config.json").read_text())), IDS)
    assert error(logits_of(theirs, IDS), expected) < TOLERANCE
    if "reorder_and_upcast_attn" not in settings:  # which computes attention in float32
        assert error(logits_of(theirs.double(), IDS), expected) < 1e-12
    assert error(logits, expected) < TOLERANCE


SAVED = [
    {},
    {"n_inner": 80},
    {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
    {"layer_norm_epsilon": 1e-3},
]


def a_model(**settings: Any) -> GPT:
    """A small model with random weights only, on the byte vocabulary."""
    mx.random.seed(0)
    shape = {"vocab_size": 264, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT(GPTConfig(**(shape | settings)))
    parameters = tree_flatten(model.parameters())
    model.load_weights([(name, weight + mx.random.normal(weight.shape, scale=0.3)) for name, weight in parameters])
    return model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("settings", SAVED, ids=str)
def test_a_folder_we_saved_opens_in_transformers_with_the_same_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = a_model(**settings)
    save(model, Tokenizer.bytes(), tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # no key missing, unexpected, or of another shape
    assert {name: getattr(theirs.config, name) for name in asdict(model.config)} == asdict(model.config)
    assert theirs.config.eos_token_id == Tokenizer.bytes().eot_id
    ids = np.arange(48).reshape(2, 24)
    in_float32 = logits_of(theirs.eval(), ids)
    exact = logits_of(theirs.double(), ids)
    off, off_theirs = error(np.array(model(ids)), exact), error(in_float32, exact)
    print(f"{settings}: error {off:.1e}, of transformers {off_theirs:.1e}")
    assert off < 2 * off_theirs
    if on_cpu():  # a GPU rounds differently
        assert off < TOLERANCE


@pytest.mark.parity
def test_a_folder_we_saved_opens_in_mlx_lm_with_the_same_logits(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    model = a_model()
    save(model, Tokenizer.bytes(), tmp_path)
    theirs, tokenizer = mlx_lm.load(str(tmp_path))
    ids = np.arange(48).reshape(2, 24)
    assert error(np.array(model(ids)), np.array(theirs(mx.array(ids))).astype(np.float64)) < TOLERANCE
    assert tokenizer.encode("héllo") == Tokenizer.bytes().encode("héllo")
    assert tokenizer.eos_token_ids == {Tokenizer.bytes().eot_id}


@pytest.mark.parity
def test_our_folder_saved_again_by_transformers_loads_with_the_same_logits(tmp_path: Path) -> None:
    _, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = a_model()
    save(model, Tokenizer.bytes(), tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")  # several files
    Tokenizer.bytes().save(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    again, _ = load(tmp_path / "theirs")
    assert mx.array_equal(again(IDS), model(IDS))


@pytest.mark.slow
@pytest.mark.parity
def test_at_gpt2s_size_our_error_is_at_most_one_and_a_half_times_that_of_transformers() -> None:
    """In a separate process, which can turn off TF32 before MLX is imported."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    environment = os.environ | {"MLX_ENABLE_TF32": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).parents[1] / "benchmarks" / "parity_at_gpt2_size.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for line in run.stdout.splitlines():
        found = json.loads(line)
        figures = (
            f"GPT-2 124M's shape, N(0, {found['std']}): largest error ours {found['ours']:.2e}, transformers' "
            f"{found['theirs']:.2e}, ratio {found['ratio']:.2f}; of a product alone {found['product_ratio']:.2f}"
        )
        print(figures)
        assert found["ratio"] < 1.5, figures


def test_to_hub_inverts_from_hub_bit_for_bit(config: GPTConfig) -> None:
    back = to_hub(from_hub({name: mx.array(weight) for name, weight in WEIGHTS.items()}, config))
    assert set(back) == set(hub_shapes(config))
    assert all(np.array_equal(np.array(back[name]), WEIGHTS[f"transformer.{name}"]) for name in back)
