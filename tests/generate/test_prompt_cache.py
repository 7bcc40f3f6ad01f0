"""A saved prompt cache: the continuation is unchanged, and another model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.generate import prompt_cache
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.prompt_cache import fingerprint, load_prompt_cache, save_prompt_cache
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
LONG, SHORT = list(range(100, 120)), [7, 8]


def new_model(seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(GPTConfig(vocab_size=257, n_positions=48, n_embd=64, n_layer=2, n_head=2, initializer_range=0.3)).eval()


def generated(model: GPT, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    settings = GenerationSettings(**({"temperature": 0, "max_tokens": 12} | more.pop("settings", {})))
    rows: list[list[int]] = [[] for _ in prompts]
    for row, piece in Generation(model, TOKENIZER, prompts, settings, **more):
        if piece.token:
            rows[row].append(piece.token.id)
    return rows


def kept(model: GPT, file: Path, ids: list[int], **settings: Any) -> None:
    run = Generation(model, TOKENIZER, [ids], GenerationSettings(**settings))
    run.read_prompt()
    save_prompt_cache(file, run.decoder, ids)


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_the_continuation_equals_that_of_the_whole_text(tmp_path: Path, bits: int | None) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG, cache_bits=bits)
    before = load_prompt_cache(tmp_path / "cache", model)
    assert (before.ids, before.bits) == (LONG, bits)
    settings = {"settings": {"cache_bits": bits}}
    for prompt in (SHORT, [9], []):  # of an empty one, the last token is read once more
        plain = generated(model, [LONG + prompt], **settings)
        assert len(set(plain[0])) > 3
        assert generated(model, [prompt], prefix=before) == plain


def test_it_works_with_batches_drafts_and_sliding(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    before = load_prompt_cache(tmp_path / "cache", model)
    assert generated(model, [[1], [2]], prefix=before) == generated(model, [[*LONG, 1], [*LONG, 2]])
    assert generated(model, [SHORT], prefix=before, draft="lookup") == generated(model, [LONG + SHORT])
    sliding = {"context": "slide", "max_tokens": 60}
    assert generated(model, [SHORT], prefix=before, settings=sliding) == generated(
        model, [LONG + SHORT], settings=sliding
    )
    with pytest.raises(UsageError, match="--prompt-cache need prompts of one length"):
        generated(model, [[1], [1, 2]], prefix=before)


def test_only_the_prompt_is_saved(tmp_path: Path) -> None:
    model = new_model()
    run = Generation(model, TOKENIZER, [LONG], GenerationSettings(temperature=0, max_tokens=10))
    list(run)
    save_prompt_cache(tmp_path / "cache", run.decoder, LONG)
    assert generated(model, [SHORT], prefix=load_prompt_cache(tmp_path / "cache", model)) == generated(
        model, [LONG + SHORT]
    )


def test_only_the_new_tokens_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = new_model(), []
    kept(model, tmp_path / "cache", LONG)
    hidden = GPT.hidden

    def spy(self: GPT, tokens: mx.array, cache: Any = None) -> mx.array:
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, cache)

    monkeypatch.setattr(GPT, "hidden", spy)
    generated(model, [SHORT], prefix=load_prompt_cache(tmp_path / "cache", model), settings={"max_tokens": 1})
    assert lengths == [len(SHORT)]


def test_the_saved_text_counts_towards_the_context(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    before = load_prompt_cache(tmp_path / "cache", model)
    with pytest.raises(UsageError, match="the prompt is 48 tokens long and the model's context is 48"):
        generated(model, [[1] * 28], prefix=before)


def test_a_model_that_differs_in_one_weight_is_refused(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    nearly = new_model()
    nearly.ln_f.bias = nearly.ln_f.bias.at[3].add(1e-7)
    for other in (new_model(1), nearly):
        with pytest.raises(UsageError, match="this prompt was read by another model"):
            load_prompt_cache(tmp_path / "cache", other)
    assert fingerprint(new_model()) == fingerprint(model)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model, file = new_model(), tmp_path / "cache"
    with pytest.raises(ModelFolderError, match="cannot be read"):
        load_prompt_cache(file, model)
    kept(model, file, LONG)
    whole = file.read_bytes()
    for damaged in (b"", b"hello", whole[:-10], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ModelFolderError, match="expected a whole safetensors file"):
            load_prompt_cache(file, model)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros((2,))})
    with pytest.raises(UsageError, match="expected what --save-prompt-cache wrote"):
        load_prompt_cache(tmp_path / "other.safetensors", model)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = new_model(), tmp_path / "cache"
    kept(model, file, LONG)
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        kept(model, file, SHORT)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
