"""The page's model computes what Python computes: activations, logits, edits, readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import C, P, V, random_model

from mlx_gpt import lens
from mlx_gpt.config import ACTIVATIONS
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser
TINYWORLD = Path(__file__).parents[3] / "weights/tinyworld"
TEXTS = [  # the page was made with none of them
    "One sunny morning, Lily went to the garden.",
    'Ben said, "Can you help me?" He had 3 red balls\n\nand a black boat; Zoë\'s cat ran äway… 🙂',
    "Once upon a time there was a girl. " * 16,
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"n_inner": 21, "n_head": 1},
    {"n_embd": 27, "n_head": 9, "layer_norm_epsilon": 0.1},
    {"n_layer": 1},
    *({"activation_function": name} for name in ACTIVATIONS[1:]),
]


def assert_equal(page: np.ndarray, python: mx.array) -> None:
    """Assert that no number differs by more than 5e-5 of itself plus 1e-5 of the largest."""
    found, expected = page.astype(np.float64), np.array(python.astype(mx.float32)).astype(np.float64)
    assert found.shape == expected.shape
    masked = np.isinf(expected)
    assert (found[masked] == expected[masked]).all()
    found, expected = found[~masked], expected[~masked]
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-5 * np.abs(expected).max())


def compare(
    modules: Any, model: GPT, ids: list[int], page: dict[str, Any], python: dict[str, Any] | None = None
) -> None:
    """Assert that all activations and the logits of a text are equal, with edits in the form of each."""
    logits, activations = lens.trace(model, [ids], python)
    found = modules.trace(ids, page)
    assert [*found] == [*activations, "hook_unembed"]
    for name, expected in [*activations.items(), ("hook_unembed", logits)]:
        assert_equal(found[name], expected[0])


@pytest.fixture(scope="module")
def tinyworld(modules: Any) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load(TINYWORLD)
    return modules.open(model, tokenizer), tokenizer


@pytest.mark.parametrize("text", TEXTS, ids=["short", "other characters", "as long as the context"])
def test_every_activation_of_tinyworld_is_pythons(modules: Any, tinyworld: Any, text: str) -> None:
    model, tokenizer = tinyworld
    ids = modules("encode", [*np.frombuffer(text.encode("utf-16-le"), np.uint16).tolist()])[: model.config.n_positions]
    assert ids == tokenizer.encode_prompt(text)[: model.config.n_positions]
    compare(modules, model, ids, {})


def test_every_float16_is_decoded_exactly(modules: Any) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    assert (np.array(modules("decodeHalf", bits.tolist())) == bits.view(np.float16).astype(np.float64)).all()


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: str(fields)[1:-1] or "gpt2")
def test_every_activation_of_other_models_is_pythons(modules: Any, fields: dict[str, Any]) -> None:
    model = modules.open(random_model(seed=1, **fields), Tokenizer.bytes())
    compare(modules, model, ids_of(11), {})


def test_a_quantized_model_computes_with_its_dequantized_weights(modules: Any) -> None:
    quantized = quantize(random_model(n_embd=64, n_inner=64), bits=4)
    model = modules.open(quantized, Tokenizer.bytes())
    compare(modules, model, ids_of(9), {})
    logits, _ = lens.trace(quantized, [ids_of(9)])
    assert mx.abs(logits - lens.trace(model, [ids_of(9)])[0]).max().item() < 0.02 * mx.abs(logits).max().item()


@pytest.mark.parametrize(
    ("page", "python"),
    [
        ({"heads": {"1.2": 0}}, {"blocks.1.attn.hook_z": "head"}),
        ({"mlps": {"0": -1.5}}, {"blocks.0.hook_mlp_out": "scale"}),
        ({"patch": {"name": "blocks.2.hook_resid_pre", "position": 4}}, {"blocks.2.hook_resid_pre": "patch"}),
        ({"patch": {"name": "blocks.0.attn.hook_v", "position": 0}}, {"blocks.0.attn.hook_v": "patch"}),
        (
            {"heads": {"1.2": 0}, "mlps": {"0": -1.5}, "patch": {"name": "blocks.2.hook_resid_pre", "position": 4}},
            {"blocks.1.attn.hook_z": "head", "blocks.0.hook_mlp_out": "scale", "blocks.2.hook_resid_pre": "patch"},
        ),
    ],
    ids=["head", "MLP", "residual stream", "values", "all"],
)
def test_an_edited_run_is_pythons(modules: Any, page: dict[str, Any], python: dict[str, str]) -> None:
    vector = [round(float(x), 3) for x in np.random.default_rng(0).normal(size=C)]
    position = page.get("patch", {}).get("position", 0)

    def scale_head(z: mx.array, name: str) -> mx.array:
        z[:, :, 2] = 0
        return z

    def patch(x: mx.array, name: str) -> mx.array:
        x[:, position] = mx.array(vector).reshape(x.shape[2:])
        return x

    functions = {"head": scale_head, "scale": lambda x, name: x * -1.5, "patch": patch}
    edits = {**page, **({"patch": {**page["patch"], "value": vector}} if "patch" in page else {})}
    model = modules.open(random_model(), Tokenizer.bytes())
    plain = modules.trace(ids_of(9), names=["hook_unembed"])["hook_unembed"]
    compare(modules, model, ids_of(9), edits, {name: functions[kind] for name, kind in python.items()})
    assert np.abs(modules.trace(ids_of(9), edits, ["hook_unembed"])["hook_unembed"] - plain).max() > 0.01
    assert (modules.trace(ids_of(9), names=["hook_unembed"])["hook_unembed"] == plain).all()


def test_activations_that_are_stored_by_name_are_pythons(modules: Any) -> None:
    model = modules.open(random_model(), Tokenizer.bytes())
    names = ["blocks.1.attn.hook_result", "blocks.0.ln1.hook_out", "blocks.2.ln2.hook_out", "blocks.1.attn.v.hook_in"]
    names += ["ln_final.hook_out"]
    _, expected = lens.trace(model, [ids_of(7)], names=names)
    found = modules.trace(ids_of(7), names=names)
    for name in names:
        assert_equal(found[name], expected[name][0])


def test_a_shared_beginning_gives_the_same_numbers_as_a_fresh_pass(modules: Any) -> None:
    model = random_model()
    texts = [ids_of(12), ids_of(12)[:9], [*ids_of(12)[:9], 3, 4], [5, *ids_of(12)], ids_of(12)[:1], ids_of(12)]
    edits: list[dict[str, Any]] = [{}, {"heads": {"0.1": 0}}]
    fresh = []
    for ids in texts:
        for edit in edits:
            modules.open(model, Tokenizer.bytes())
            fresh.append(modules.trace(ids, edit))
    modules.open(model, Tokenizer.bytes())
    for i, ids in enumerate(texts):
        for j, edit in enumerate(edits):
            found = modules.trace(ids, edit)
            for name, expected in fresh[2 * i + j].items():
                assert (found[name] == expected).all(), (name, ids)


def test_a_text_in_slices_gives_the_same_numbers_as_in_one(modules: Any) -> None:
    edits = {"heads": {"0.1": 0.5}, "mlps": {"1": 2}}
    edits["patch"] = {"name": "blocks.1.hook_resid_mid", "position": 7, "value": [0.5] * C}
    found = []
    for n in (P, 1, 4):
        modules.open(random_model(), Tokenizer.bytes())
        modules("setRowsAtOnce", n)
        found.append(modules.trace(ids_of(P - 1), edits))
    for name, whole in found[0].items():
        assert all((sliced[name] == whole).all() for sliced in found[1:]), name


def test_a_newer_text_stops_an_older_one_of_its_lane(modules: Any) -> None:
    modules.open(random_model(), Tokenizer.bytes())
    texts = [ids_of(n) for n in (20, 21, 22, 23)]
    found = modules("traceAll", texts, ["text", "text", "other", "text"])
    assert found == ["Superseded", "Superseded", "fulfilled", "fulfilled"]


def test_a_text_that_does_not_fit_is_refused_in_pythons_words(modules: Any) -> None:
    model = modules.open(random_model(), Tokenizer.bytes())
    for ids in ([], [1] * (P + 1)):
        with pytest.raises(UsageError) as error:
            lens.trace(model, mx.array([ids], mx.int32))
        assert modules("errorOf", ids) == str(error.value)


@pytest.mark.parametrize("edited", [False, True])
def test_generated_text_is_pythons(modules: Any, tinyworld: Any, edited: bool) -> None:
    model, tokenizer = load(TINYWORLD)
    model = modules.open(model, tokenizer)
    ids = tokenizer.encode_prompt(TEXTS[0])
    edits = {"blocks.2.hook_mlp_out": lambda x, name: x * 0} if edited else None
    expected = lens.generate(model, [ids], 30, edits=edits)[0].tolist()
    assert modules("generate", ids, 30, {"mlps": {"2": 0}} if edited else {}) == expected


def test_generated_text_ends_where_the_context_is_full(modules: Any) -> None:
    model = modules.open(random_model(), Tokenizer.bytes())
    assert modules("generate", ids_of(P - 3), 50, {}) == lens.generate(model, [ids_of(P - 3)], 50)[0].tolist()


def test_the_logit_lens_is_pythons(modules: Any) -> None:
    model = modules.open(random_model(), Tokenizer.bytes())
    logits, activations = lens.trace(model, [ids_of(9)])
    ids, logprobs = lens.logit_lens_top(model, activations, k=5)
    for position in (0, 8):
        found = modules("logitLens", ids_of(9), position, 5)
        assert [[token["id"] for token in layer] for layer in found] == ids[:, 0, position].tolist()
        probabilities = np.array([[token["probability"] for token in layer] for layer in found])
        assert np.allclose(probabilities, np.exp(np.array(logprobs[:, 0, position])), rtol=1e-4)
    assert modules("next", ids_of(9), 8, 5) == found[-1]
    assert [token["logit"] for token in found[-1]] == pytest.approx(logits[0, 8, ids[-1, 0, 8]].tolist(), rel=1e-4)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_the_attribution_is_pythons(modules: Any, fields: dict[str, Any]) -> None:
    model = modules.open(random_model(**fields), Tokenizer.bytes())
    logits, activations = lens.trace(model, [ids_of(9)])
    values, labels = lens.logit_attribution(model, activations, lens.logit_direction(model, 7), by="head")
    for position in (0, 8):
        found = modules("attribution", ids_of(9), position, 7)
        assert [part["label"] for part in found] == labels
        assert_equal(np.array([part["value"] for part in found]), values[:, 0, position])
        assert sum(part["value"] for part in found) == pytest.approx(logits[0, position, 7].item(), rel=1e-4)


def test_norms_are_those_of_the_vectors(modules: Any) -> None:
    model = modules.open(random_model(), Tokenizer.bytes())
    names = ["blocks.1.attn.hook_result", "blocks.2.hook_resid_mid"]
    _, activations = lens.trace(model, [ids_of(9)], names=names)
    for name in names:
        found = np.array(modules("norms", ids_of(9), name))
        assert_equal(found, mx.linalg.norm(activations[name][0], axis=-1).reshape(-1))


def test_rounding_to_float16_hardly_changes_the_logits_of_tinyworld(tinyworld: Any) -> None:
    rounded, tokenizer = tinyworld
    ids = [tokenizer.encode_prompt(TEXTS[2])[:144]]
    exact, page = (mx.softmax(model(ids), axis=-1) for model in (load(TINYWORLD)[0], rounded))
    assert mx.abs(exact - page).max().item() < 0.02


def ids_of(n: int) -> list[int]:
    return np.random.default_rng(3).integers(0, V, n).tolist()
