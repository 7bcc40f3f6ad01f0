"""Published values are compared within their published tolerance, and any changed byte of known weights is detected.

The tests have no known weights. They make a small model known, with values computed by the float64 reference.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.check import reference
from mlx_gpt.check.hub_folder import HubFolder, HubWeights
from mlx_gpt.check.published import MEASURES, check_name, check_published, compare, known_models, training_losses
from mlx_gpt.check.reference import gpt2
from mlx_gpt.check.result import Check
from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.lens import repeated_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer

P = 128
CONFIG = GPTConfig(vocab_size=257, n_positions=P, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 94, 9)  # ASCII, so that they are also a text
CHECKSUM = "checksum of the weights"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like OpenAI's on the hub, which has mask buffers."""
    mx.random.seed(0)
    model = GPT(CONFIG)
    model.update(tree_map(lambda weight: weight + 0.1 * mx.random.normal(weight.shape), model.parameters()))
    model.wte.weight = mx.where(mx.arange(257)[:, None] < 94, model.wte.weight, 0)  # so that it generates ASCII only
    save(model, Tokenizer.bytes(), tmp_path / "toy")
    file = tmp_path / "toy" / "model.safetensors"
    masks = {f"h.{i}.attn.bias": mx.tril(mx.ones((1, 1, P, P))) for i in range(2)}
    weights = dict(mx.load(str(file))) | masks
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    return tmp_path / "toy"


def entries(folder: Path) -> list[dict[str, Any]]:
    """An entry of every kind but training, computed by the reference."""
    logits, ids = gpt2(HubFolder(folder), IDS), IDS.tolist()
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rounded = [int(logp[t, ids[t + 1]] * 1e6) / 1e6 for t in range(len(ids) - 1)]
    greedy = ids.copy()
    for _ in range(5):
        greedy.append(int(gpt2(HubFolder(folder), np.array(greedy))[-1].argmax()))
    text = Tokenizer.bytes().decode(greedy[9:])
    at = [[0, 3], [4, 100], [8, 256]]
    return [
        {"kind": "logits", "ids": ids, "at": at, "values": [logits[a, b] for a, b in at], "absolute": 1e-4},
        {"kind": "mean logit", "ids": ids, "values": [logits.mean()], "absolute": 1e-4},
        {"kind": "most probable", "ids": ids, "values": logits.argmax(-1).tolist()},
        {"kind": "log-probabilities", "ids": ids, "values": rounded, "relative": 1e-4},
        {"kind": "loss", "ids": ids, "values": [-np.mean(rounded)], "absolute": 1e-4},
        {"kind": "greedy ids", "ids": ids, "values": greedy[9:]},
        {"kind": "greedy text", "prompt": Tokenizer.bytes().decode(ids), "values": text},
        *lens_entries(HubFolder(folder), ids),
    ]


def lens_entries(weights: HubFolder, ids: list[int]) -> list[dict[str, Any]]:
    """An entry of every kind that is measured with the lens, computed by the reference from changed weights."""
    text, after_start = Tokenizer.bytes().decode(ids), np.array([256, *ids])
    prompts = [[text, " y", "b"], [text[:4], "c", "d"]]
    difference = [
        gpt2(weights, after_start)[-1] @ one_hot(" ", "b"),
        gpt2(weights, after_start[:5])[-1] @ one_hot("c", "d"),
    ]

    def loss(value: Any = None) -> float:
        """The loss of the text with the values of head 1 of layer 1 equal to ``value`` at each token."""
        logits = gpt2(weights if value is None else with_values(weights, value), after_start[:-1])
        return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), ids]).mean())

    layer = weights.block(1)
    of_zero = layer["ln_1.bias"] @ layer["attn.c_attn.weight"] + layer["attn.c_attn.bias"]
    losses = [loss(), loss(0), loss(of_zero[-8:])]
    at = {"prompt": text, "layer": 1, "head": 1}
    ranked = [np.argsort(-scores).tolist() for scores in reference_scores(weights)]
    names = ["0.0", "0.1", "1.0", "1.1"]
    return [
        {"kind": "answer difference", "prompts": prompts, "values": [float(np.mean(difference))], "absolute": 1e-4},
        {"kind": "losses without values", **at, "values": losses, "absolute": 1e-4},
        {"kind": "heads", "score": "previous token", "values": names[ranked[0][0]]},
        {"kind": "heads", "score": "induction", "values": " ".join(names[i] for i in sorted(ranked[1][:2]))},
    ]


def one_hot(right: str, wrong: str) -> np.ndarray:
    right_id, wrong_id = Tokenizer.bytes().encode(right + wrong)
    return np.eye(257)[right_id] - np.eye(257)[wrong_id]


def with_values(weights: HubFolder, value: Any) -> HubWeights:
    """The weights with those of the last head's values zero, and its bias ``value``, in layer 1."""
    changed = {name: weights.read(name) for name in weights.tensors}
    changed["h.1.attn.c_attn.weight"][:, -8:] = 0
    changed["h.1.attn.c_attn.bias"][-8:] = value
    return HubWeights(changed, weights.settings)


def reference_scores(weights: HubFolder) -> tuple[np.ndarray, np.ndarray]:
    """Previous-token and induction scores of the four heads on repeated random tokens."""
    x = reference.embed(weights, np.array(repeated_tokens(257, 50, 10, start=256)))
    patterns = []
    for layer in range(2):
        exact = reference.block(x, weights.block(layer), weights.settings, layer)
        patterns += [*exact["attn.pattern"].swapaxes(0, 1)]
        x = exact["resid_post"]
    before = [np.mean([p[:, t, t - 1] for t in range(1, 101)]) for p in patterns]
    return np.array(before), np.array([np.mean([p[:, t, t - 49] for t in range(51, 101)]) for p in patterns])


def known(folder: Path, **changes: Any) -> dict[str, Any]:
    model, _ = load(folder)
    toy = {"ids": ["toy", "someone/toy"], "parameters": model.n_parameters, "sha256_source": "here"}
    toy["sha256"] = {"model.safetensors": sha256_of(folder / "model.safetensors")}
    toy["figures"] = [entry | {"what": entry["kind"], "source": "here"} for entry in entries(folder)]
    return {"toy": toy | changes}


def report(folder: Path, name: str | None, models: dict[str, Any]) -> dict[str, Check]:
    model, tokenizer = load(folder)
    return {check.what: check for check in check_published(model, tokenizer, HubFolder(folder), name, models)}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


# Values


@pytest.mark.parametrize("name", ["toy", "someone/toy", None])
def test_a_known_model_is_identified_by_its_id_or_its_bytes_and_its_values_agree(
    folder: Path, name: str | None
) -> None:
    found = report(folder, name, known(folder))
    assert [check.what for check in found.values() if not check.holds] == []
    assert list(found) == [CHECKSUM, *(f"published: {kind}" for kind in MEASURES if kind != "training losses")]


NUMBERS = ["logits", "mean logit", "most probable", "log-probabilities", "loss", "answer difference"]


@pytest.mark.parametrize("kind", [*NUMBERS, "losses without values"])
def test_a_value_beyond_its_published_tolerance_is_wrong(folder: Path, kind: str) -> None:
    model, tokenizer = load(folder)
    entry = next(entry for entry in entries(folder) if entry["kind"] == kind) | {"what": "", "source": ""}
    values = np.array(entry["values"])
    assert compare(model, tokenizer, entry).holds
    values[-1] += 1 if kind == "most probable" else 2e-4 * max(1, abs(values[-1]))
    assert compare(model, tokenizer, entry | {"values": values.tolist()}).holds is False


@pytest.mark.parametrize("kind", ["greedy ids", "greedy text", "heads"])
def test_a_different_continuation_or_head_is_wrong(folder: Path, kind: str) -> None:
    model, tokenizer = load(folder)
    entry = next(entry for entry in entries(folder) if entry["kind"] == kind) | {"what": "", "source": ""}
    values = entry["values"]
    other = values[:-1] + ("~" if isinstance(values, str) else [values[-1] ^ 1])
    assert compare(model, tokenizer, entry).holds
    assert compare(model, tokenizer, entry | {"values": other}).holds is False


TRAINING = {
    "kind": "training losses",
    "ids": np.random.default_rng(1).integers(0, 257, 25).tolist(),
    "shape": [2, 12],
    "learning_rate": 1e-2,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "values": [0.0] * 10,
}


def test_measuring_training_losses_does_not_change_the_model(folder: Path) -> None:
    model, tokenizer = load(folder)
    before: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    losses = training_losses(model, tokenizer, TRAINING)
    after: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    assert losses[-1] < losses[0] - 1
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parity
def test_training_losses_equal_those_of_torchs_adamw(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    settings = {name: TRAINING[name] for name in ("betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=TRAINING["learning_rate"], **settings)
    ids = torch.tensor(TRAINING["ids"])
    losses = []
    for _ in range(10):
        logits = theirs(ids[:-1].reshape(2, 12)).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(24, -1), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model, tokenizer = load(folder)
    assert np.allclose(training_losses(model, tokenizer, TRAINING), losses, atol=2e-4, rtol=0)


# Bytes


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, 1.0])
def test_any_changed_byte_of_known_weights_is_detected(folder: Path, place: float) -> None:
    models, file = known(folder), folder / "model.safetensors"
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, start + int(place * (file.stat().st_size - start - 1)))
    found = report(folder, "toy", models)[CHECKSUM]
    assert found.holds is False
    assert found.remark.startswith("model.safetensors: expected sha256 ")


def test_weights_in_the_hubs_cache_must_have_the_sha256_of_their_name(folder: Path) -> None:
    """So any model of the hub is checked, known or not."""
    file = folder / "model.safetensors"
    blob = folder.parent / "blobs" / sha256_of(file)
    blob.parent.mkdir()
    shutil.move(file, blob)
    file.symlink_to(blob)
    assert report(folder, "somebody/else", {})[CHECKSUM].holds
    flip(blob, blob.stat().st_size - 1)
    assert report(folder, "somebody/else", {})[CHECKSUM].holds is False


def test_the_checksum_of_a_rewritten_copy_is_skipped(folder: Path, tmp_path: Path) -> None:
    models = known(folder)
    save(*load(folder), tmp_path / "copy")
    assert report(tmp_path / "copy", "toy", models)[CHECKSUM].holds is None


def test_another_model_under_a_known_name_is_wrong(folder: Path) -> None:
    found = report(folder, "toy", known(folder, parameters=5))
    assert found["parameters of toy"].holds is False


def test_for_an_unknown_model_the_report_names_known_as(folder: Path) -> None:
    found = report(folder, None, known_models())
    assert found["published values"].holds is None
    assert "--known-as distilgpt2, gpt2, gpt2-large, gpt2-medium, gpt2-xl" in found["published values"].remark


def test_an_unknown_name_is_refused() -> None:
    assert check_name("gpt2", known_models()) == "gpt2"
    with pytest.raises(UsageError, match="--known-as must be one of"):
        check_name("gpt3", known_models())


# The published values of the package


@pytest.mark.parametrize("name", known_models())
def test_the_published_values_are_complete(name: str) -> None:
    known = known_models()[name]
    assert set(known) == {"ids", "parameters", "sha256", "sha256_source", "figures"}
    assert known["ids"][0] == name
    config = PRESETS[name]
    C, V, P, L = config.n_embd, config.vocab_size, config.n_positions, config.n_layer
    assert known["parameters"] == (V + P) * C + L * (12 * C * C + 13 * C) + 2 * C
    assert all(len(digest) == 64 and int(digest, 16) for digest in known["sha256"].values())
    for entry in known["figures"]:
        assert entry["kind"] in MEASURES
        assert entry["source"]
        assert all(0 <= i < V for i in entry.get("ids", []))
        expected = {"logits": len(entry.get("at", [])), "log-probabilities": len(entry.get("ids", [])) - 1}
        assert len(entry["values"]) == expected.get(entry["kind"], len(entry["values"]))


def test_the_batch_of_llm_c_is_the_one_with_the_published_hash() -> None:
    (entry,) = (entry for entry in known_models()["gpt2"]["figures"] if entry["kind"] == "training losses")
    ids = np.array(entry["ids"], "<u2")
    assert (
        hashlib.sha256(ids.tobytes()).hexdigest() == "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"
    )
    assert len(ids) == np.prod(entry["shape"]) + 1
    assert len(entry["values"]) == 10


def test_every_entry_of_gpt2_can_be_measured_and_fails_for_another_model() -> None:
    """On a shallow random model with GPT-2's vocabulary."""
    mx.random.seed(0)
    model = GPT(GPTConfig(n_positions=256, n_embd=8, n_layer=1, n_head=1)).eval()
    for entry in known_models()["gpt2"]["figures"]:
        if entry["kind"] == "training losses":
            entry["values"] = entry["values"][:2]  # takes seconds
        if entry["kind"] != "greedy text":  # needs GPT-2's tokenizer
            assert compare(model, Tokenizer.bytes(), entry).holds is False
