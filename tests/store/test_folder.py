"""A model folder loads as it was saved, a failed save changes nothing, and damage is reported in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import MLXGPTError, ModelFolderError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store import folder as folder_module
from mlx_gpt.store.convert import to_hub
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer

TINY_GPT2 = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
SMALL = GPTConfig(vocab_size=257, n_positions=8, n_embd=16, n_layer=2, n_head=2)
IDS = np.arange(16).reshape(2, 8)
TOKENIZER = Tokenizer.bytes()


def new_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a valid model folder."""
    save(new_model(), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def same_weights(a: GPT, b: GPT) -> bool:
    theirs = dict(tree_flatten(b.parameters()))
    return all(mx.array_equal(weight, theirs.pop(name)) for name, weight in tree_flatten(a.parameters())) and not theirs


def refusal(name: Any, **options: Any) -> str:
    """Return the one line with which ``load`` refuses."""
    with pytest.raises(MLXGPTError) as error:
        load(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_config(folder: Path, **changes: Any) -> None:
    """Change settings in ``config.json``; ``...`` removes one."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def write_header(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Saved and loaded


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_inner": 24},
    {"activation_function": "gelu"},
    {"tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "layer_norm_epsilon": 1e-6, "initializer_range": 0.1},
    {"vocab_size": 320},  # padded: more ids than the tokenizer has
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_saved_model_loads_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = new_model(replace(SMALL, **settings))
    save(model, TOKENIZER, tmp_path)
    again, tokenizer = load(tmp_path)
    assert again.config == model.config
    assert same_weights(again, model)
    assert mx.array_equal(again(IDS), model(IDS))
    assert tokenizer.hash == TOKENIZER.hash


def test_a_loaded_model_is_in_eval_mode(tmp_path: Path) -> None:
    save(new_model(replace(SMALL, embd_pdrop=0.5)), TOKENIZER, tmp_path)
    model, _ = load(tmp_path)
    assert not model.training
    assert mx.array_equal(model(IDS), model(IDS))


def test_a_loaded_model_does_not_need_its_folder(folder: Path) -> None:
    model, _ = load(folder)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # weights not yet read would now be zeros
    assert mx.array_equal(model(IDS), new_model()(IDS))


def test_a_folder_has_the_hubs_tensors_and_files(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((folder / "config.json").read_text())
    assert settings == asdict(SMALL) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": 8,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    weights, metadata = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert weights["h.1.attn.c_attn.weight"].shape == (16, 48)


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path: Path) -> None:
    model = new_model()
    model.set_dtype(mx.bfloat16)
    save(model, TOKENIZER, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(tmp_path)[0].wte.weight.dtype == mx.float32
    again, _ = load(tmp_path, dtype=mx.bfloat16)
    assert again.wte.weight.dtype == mx.bfloat16
    assert same_weights(again, model)


def test_a_second_save_replaces_the_first_and_leaves_other_files_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    other = new_model(replace(SMALL, n_layer=1), seed=1)
    save(other, TOKENIZER, folder)
    assert same_weights(load(folder)[0], other)
    assert (folder / "notes.txt").read_text() == "mine"


def test_saving_over_a_sharded_model_removes_its_shards(folder: Path) -> None:
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "added_tokens.json"):
        (folder / stale).write_text("{}")
    save(new_model(seed=1), TOKENIZER, folder)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    assert not (folder / "added_tokens.json").exists()


# Failed saves


STEPS = ["tokenizer", "config", "weights", "truncated", "fsync", *(f"move {i}" for i in range(6))]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_new", [False, True], ids=["over an earlier model", "into a new folder"])
def test_a_save_that_fails_at_any_step_leaves_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_new: bool
) -> None:
    folder, earlier = tmp_path / "model", new_model()
    if not is_new:
        save(earlier, TOKENIZER, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None
    if step == "truncated":
        write = folder_module.write_safetensors

        def save_half(file: Path, *rest: Any) -> None:
            write(file, *rest)
            os.truncate(file, os.path.getsize(file) // 2)

        monkeypatch.setattr(folder_module, "write_safetensors", save_half)
    elif step.startswith("move"):
        break_move(monkeypatch, int(step.removeprefix("move ")))
    else:
        where, name = {
            "tokenizer": (Tokenizer, "save"),
            "config": (Path, "write_text"),
            "weights": (folder_module, "write_safetensors"),
            "fsync": (folder_module, "fsync"),
        }[step]
        monkeypatch.setattr(where, name, no_room)

    other, its_tokenizer = new_model(replace(SMALL, n_layer=1, vocab_size=258), seed=1), Tokenizer.train(["ab ab"], 258)
    with pytest.raises(ModelFolderError, match="header promises" if step == "truncated" else "No space left"):
        save(other, its_tokenizer, folder)
    monkeypatch.undo()

    if before is None:
        assert not folder.exists()
    else:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert same_weights(load(folder)[0], earlier)


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def break_move(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the ``at``-th move of a file into the folder fail."""
    move, calls = os.replace, iter(range(100))
    monkeypatch.setattr(os, "replace", lambda *pair: no_room() if next(calls) == at else move(*pair))


def test_an_interrupted_save_leaves_the_earlier_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(new_model(seed=1), TOKENIZER, folder)
    monkeypatch.undo()
    assert same_weights(load(folder)[0], new_model())
    assert not list(folder.glob(".*"))


def test_save_refuses_a_folder_that_could_not_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFolderError, match="could not be saved"):
        save(new_model(), TOKENIZER, tmp_path / "file")
    with pytest.raises(ModelFolderError, match="the tokenizer has 257 ids, the model 256"):
        save(new_model(replace(SMALL, vocab_size=256)), TOKENIZER, tmp_path / "model")
    quantized = new_model(replace(SMALL, n_embd=64))
    mx.eval(quantized.parameters())
    nn.quantize(quantized, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    with pytest.raises(ModelFolderError, match=r"h\.0\.attn\.c_attn\.scales: expected no such tensor"):
        save(quantized, TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Layouts of folders


def test_shards_are_read_by_their_index_and_stale_ones_are_ignored(folder: Path) -> None:
    weights = to_hub(dict(tree_flatten(new_model().parameters())))
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, part in halves.items():
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mx.save_safetensors(str(folder / "model-00001-of-00001.safetensors"), {"wte.weight": mx.zeros((257, 16))})
    (folder / "model.safetensors").unlink()
    assert same_weights(load(folder)[0], new_model())

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: expected weights, but cannot be read" in refusal(folder)
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), {"x": mx.zeros(1)})
    assert f"expected {names[9]}, found no such tensor" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../elsewhere.safetensors"}}')
    assert "expected a weight_map of tensors to files beside it, found '../elsewhere.safetensors'" in refusal(folder)


def test_without_torch_a_folder_of_pickles_is_refused_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: a PyTorch pickle, which takes torch to read or write: pip install" in refusal(folder)


def damage(folder: Path, case: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if case == "no weights":
        file.unlink()
    elif case == "empty":
        file.write_bytes(b"")
    elif case == "cut in the header":
        file.write_bytes(content[:100])
    elif case == "cut in the data":
        file.write_bytes(content[:-1])
    elif case == "longer than promised":
        file.write_bytes(content + b"\0")
    elif case == "an error page":
        file.write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    elif case == "a git-lfs pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n")
    elif case == "a header that is not JSON":
        write_header(file, b"{" * 50)
    elif case == "a header of another kind":
        write_header(file, {"wte.weight": 1})
    elif case == "overlapping tensors":
        header["wpe.weight"]["data_offsets"] = [0, 512]
        write_header(file, header, data)
    elif case == "a wrong shape in the header":
        header["wpe.weight"]["shape"] = [4, 16]
        write_header(file, header, data)
    elif case == "float64":
        write_header(file, {"x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    elif case == "a folder":
        file.unlink()
        file.mkdir()
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "an empty config":
        (folder / "config.json").write_text("")
    elif case == "a config that is a list":
        (folder / "config.json").write_text("[]")
    elif case == "another vocabulary in the config":
        write_config(folder, vocab_size=300)
    elif case == "more layers in the config":
        write_config(folder, n_layer=3)


DAMAGE = {
    "no weights": "expected model.safetensors, found no weights",
    "empty": "found 0 bytes without a whole header",
    "cut in the header": "found 100 bytes without a whole header",
    "cut in the data": "bytes where its header promises",
    "longer than promised": "bytes where its header promises",
    "an error page": "expected a whole safetensors file, found 35 bytes without a whole header",
    "a git-lfs pointer": "run git lfs pull",
    "a header that is not JSON": "found an invalid header",
    "a header of another kind": "found an invalid header",
    "overlapping tensors": "which does not fit its shape or neighbours",
    "a wrong shape in the header": "which does not fit its shape or neighbours",
    "float64": "x: expected F32, F16 or BF16, found F64, which MLX does not read",
    "a folder": "cannot be read (Is a directory)",
    "no config": "config.json: expected a settings file, but it cannot be read (No such file or directory)",
    "an empty config": "config.json: expected JSON, found something else",
    "a config that is a list": "config.json: expected a JSON object, found list",
    "another vocabulary in the config": 'if the weights are right, write "vocab_size": 257 into config.json',
    "more layers in the config": "h.2.ln_1.weight: expected shape (16,), found no such tensor (and 11 more like it)",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_reported_in_one_line(folder: Path, case: str) -> None:
    damage(folder, case)
    message = refusal(folder)
    assert DAMAGE[case] in message
    assert str(folder) in message or "config.json" in message


# The tokenizer of a folder


def without_tokenizer(folder: Path) -> Path:
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_without_tokenizer_files_gpt2s_vocabulary_means_gpt2s_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    save(new_model(GPTConfig(vocab_size, 8, 2, 1, 1)), TOKENIZER, tmp_path)
    monkeypatch.setattr(Tokenizer, "gpt2", lambda: TOKENIZER)  # the real one is downloaded
    assert load(without_tokenizer(tmp_path))[1] is TOKENIZER


def test_without_tokenizer_files_any_other_vocabulary_is_refused(folder: Path) -> None:
    message = refusal(without_tokenizer(folder))
    assert (
        "expected vocab.json and merges.txt, or tokenizer.json (of nanoGPT meta.pkl), found none, and 257 ids"
        in message
    )


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder: Path) -> None:
    Tokenizer.train(["ab ab ab"], 258).save(folder)
    assert "expected a tokenizer of at most 257 ids, the model's vocabulary, found 258" in refusal(folder)


# Names and paths


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere-at-all", "runs\\x", "-x", "x y"])
def test_a_missing_path_is_never_requested_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    assert "no such folder" in refusal(name)


def test_a_path_object_is_never_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "gpt2-of-mine: no such folder" in refusal(Path("gpt2-of-mine"))


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_revision_of_a_local_model_is_refused(folder: Path, name: str) -> None:
    assert "a revision ('main') names a version on the hub, but this is a " in refusal(folder / name, revision="main")


# Imports


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "import mlx_gpt.generate.sampling",
        "from mlx_gpt.generate import generation",
        "import mlx_gpt.store.folder",
    ],
)
def test_generate_is_the_function_whatever_was_imported_before_or_after(before: str) -> None:
    code = f"""
{before}
from mlx_gpt import generate
import mlx_gpt, mlx_gpt.generate.generation
from mlx_gpt.generate import sampling
from mlx_gpt.generate.generation import generate as the_function
assert generate is the_function is mlx_gpt.generate, generate
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_tensor_of_another_model_is_refused_with_the_name_of_its_folder(tmp_path: Path) -> None:
    save(new_model(), TOKENIZER, tmp_path)
    weights = dict(mx.load(str(tmp_path / "model.safetensors")).items())  # type: ignore[union-attr]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights | {"score.weight": mx.zeros((2, 3))})
    with pytest.raises(ModelFolderError, match=rf"{re.escape(str(tmp_path))}: score\.weight: expected no such tensor"):
        load(tmp_path)
