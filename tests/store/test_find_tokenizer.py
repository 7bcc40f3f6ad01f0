"""``--tokenizer`` takes the tokenizer of every model that opens, and refuses characters without an end token."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import TokenizerError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.export import export
from mlx_gpt.store.find_tokenizer import find_tokenizer
from mlx_gpt.store.folder import save
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

LEARNED = Tokenizer.train(["the sea, the sea, the seals and the sea"], 262)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of three: ``m``, the same as ``g/m.gguf``, and ``characters``."""
    save(GPT(GPTConfig(262, 8, 16, 1, 2)), LEARNED, tmp_path / "m")
    (tmp_path / "g").mkdir()
    export(find_source(tmp_path / "m"), tmp_path / "g" / "m.gguf", "gguf")
    save(GPT(GPTConfig(4, 8, 16, 1, 2)), CharacterTokenizer({c: i for i, c in enumerate("\nabc")}), tmp_path / "c")
    return tmp_path


@pytest.mark.parametrize("name", ["m", "m/tokenizer.json", "m/model.safetensors", "g", "g/m.gguf"])
def test_a_tokenizer_is_that_of_a_model_in_any_layout(models: Path, name: str) -> None:
    tokenizer = find_tokenizer(str(models / name))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.hash == LEARNED.hash


def test_text_is_prepared_and_trained_on_with_the_tokenizer_of_a_gguf(models: Path) -> None:
    (models / "t.txt").write_text("the sea and the seals\n\n" * 60)
    flags = ["--tokenizer", str(models / "g"), "--out"]
    assert main(["prepare", str(models / "t.txt"), *flags, str(models / "ids")]) == 0
    assert Tokenizer.from_folder(models / "ids").hash == LEARNED.hash
    sizes = {"steps": 1, "n-layer": 1, "n-embd": 16, "n-head": 2, "n-positions": 8, "batch-size": 2}
    small = [f"--{name}={n}" for name, n in sizes.items()]
    assert main(["train", "--data", str(models / "t.txt"), *flags, str(models / "run"), *small]) == 0
    assert Tokenizer.from_folder(models / "run").hash == LEARNED.hash


@pytest.mark.parametrize("name", ["c", "c/tokenizer.json"])
def test_characters_without_an_end_token_are_refused_for_training(models: Path, name: str) -> None:
    with pytest.raises(TokenizerError, match="characters has no end token"):
        find_tokenizer(str(models / name))


def test_the_name_of_an_unknown_user_is_an_ordinary_name(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "t.txt").write_text("the sea\n")
    command = ["prepare", str(models / "t.txt"), "--out", str(models / "ids"), "--tokenizer", "~nobody-here/m"]
    assert main(command) == 2
    assert "unknown tokenizer '~nobody-here/m'" in capsys.readouterr().err
