"""A nanoGPT model of characters keeps the ids of its meta.pkl, which is read without running code in it."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.layout_files import IDS

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, TokenizerError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.export import export
from mlx_gpt.store.folder import convert, load, save
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.characters import CharacterTokenizer, read_meta

STOI = {c: i for i, c in enumerate(sorted("\n !,.abcdefghijklmnopqrstuvwxyzABCÉ世🙂"))}
META = {"vocab_size": len(STOI), "itos": {i: c for c, i in STOI.items()}, "stoi": STOI}
TEXT = "a cat, É世🙂!\nB"
CONFIG = GPTConfig(len(STOI), 12, 32, 2, 2, activation_function="gelu")


def write_meta(file: Path, meta: Any = META) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(meta))
    return file


def test_ids_are_those_of_stoi_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = read_meta(write_meta(tmp_path / "meta.pkl"))
    assert tokenizer.encode(TEXT) == [STOI[c] for c in TEXT]
    save(GPT(CONFIG), tokenizer, tmp_path / "m")
    _, again = load(tmp_path / "m")
    assert again.hash == tokenizer.hash
    assert again.encode_batch([TEXT]) == [tokenizer.encode(TEXT)]
    assert again.decode(tokenizer.encode(TEXT)) == TEXT
    assert (again.vocab_size, again.end_ids, again.start_id) == (len(STOI), (), STOI["\n"])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] is None
    with pytest.raises(TokenizerError, match="and '9' is none of them"):
        again.encode("a 9")


@pytest.mark.parity
def test_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    CharacterTokenizer(STOI).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == [STOI[c] for c in TEXT]
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT


@pytest.mark.parity
@pytest.mark.parametrize("place", ["out/meta.pkl", "data/letters/meta.pkl"])
def test_a_checkpoint_finds_its_characters_beside_it_or_in_nanogpts_data(tmp_path: Path, place: str) -> None:
    torch = pytest.importorskip("torch")
    write_meta(tmp_path / place)
    mx.random.seed(0)
    model = GPT(CONFIG).eval()
    (tmp_path / "out").mkdir(exist_ok=True)
    from mlx.utils import tree_flatten

    weights: Any = tree_flatten(model.parameters())
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 12, "vocab_size": len(STOI), "bias": True}
    tensors = {f"transformer.{name}": torch.from_numpy(np.array(weight)) for name, weight in weights}
    torch.save({"model": tensors, "model_args": args, "config": {"dataset": "letters"}}, tmp_path / "out" / "ckpt.pt")
    convert(find_source(tmp_path / "out"), tmp_path / "m")
    found, tokenizer = load(tmp_path / "m")
    assert tokenizer.encode(TEXT) == [STOI[c] for c in TEXT]
    assert mx.array_equal(found(IDS % len(STOI)), model(IDS % len(STOI)))


def test_commands_generate_from_characters_and_refuse_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(GPT(CONFIG), CharacterTokenizer(STOI), tmp_path / "m")
    generate = ["generate", str(tmp_path / "m"), "--max-tokens", "4", "--min-tokens", "2", "--temperature", "0"]
    assert main([*generate, "--prompt", "a cat"]) == 0
    assert len(capsys.readouterr().out.removesuffix("\n")) >= 2
    (tmp_path / "t.txt").write_text("a cat, a cat\n" * 20)
    train = ["train", "--data", str(tmp_path / "t.txt"), "--init", str(tmp_path / "m"), "--out", str(tmp_path / "r")]
    assert main([*train, "--steps", "1"]) == 1
    assert "has no end token" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("to", "files"), [("llm.c", "tokenizer.json"), ("nanogpt", "meta.pkl, or tokenizer.json")])
def test_an_export_names_the_files_of_the_characters(tmp_path: Path, to: str, files: str) -> None:
    if to == "nanogpt":
        pytest.importorskip("torch")
    config = replace(CONFIG, activation_function="gelu_new")
    save(GPT(config), CharacterTokenizer(STOI), tmp_path / "m")
    remark = export(find_source(tmp_path / "m"), tmp_path / "x", to)
    assert f"for mlx-gpt, copy {files} of {tmp_path / 'm'} beside it" in remark
    with pytest.raises(ModelFolderError, match="this one has characters only"):
        export(find_source(tmp_path / "m"), tmp_path / "x.gguf", "gguf")


class Harm:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"stoi": {"a": 0, "c": 2}}), "characters with the ids from 0 on"),
        (pickle.dumps({"stoi": {"ab": 0}}), "characters with the ids from 0 on"),
        (pickle.dumps({"stoi": {"a": False}}), "characters with the ids from 0 on"),
        (pickle.dumps({"stoi": {"\ud800": 0}}, 4), "characters with the ids from 0 on"),
        (pickle.dumps({"itos": {}}), "KeyError: 'stoi'"),
        (pickle.dumps([1]), "TypeError"),
        (pickle.dumps(np.zeros(3)), "an object of numpy"),
        (b"", "EOFError"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "TypeError"),  # a memo of 2^31, for which the pickle module in C takes 32 GB
        (b"\x80\x05\x96" + b"\xff" * 8, "no code in it was run"),
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(TokenizerError) as refusal:
        read_meta(tmp_path / "meta.pkl")
    assert message in str(refusal.value)


def test_code_in_a_meta_pkl_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"an object of \w+\.mkdir\); no code in it was run"):
        read_meta(write_meta(tmp_path / "meta.pkl", {"stoi": Harm(tmp_path / "harm")}))
    assert not (tmp_path / "harm").exists()
