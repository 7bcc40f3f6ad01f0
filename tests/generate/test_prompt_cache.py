"""A saved prompt cache: the continuation is unchanged, and another model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.generate import prompt_cache
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.prompt_cache import fingerprint, hash_of, load_prompt_cache, save_prompt_cache
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
    save_prompt_cache(file, run.decoder, TOKENIZER, ids)


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_the_continuation_equals_that_of_the_whole_text(tmp_path: Path, bits: int | None) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG, cache_bits=bits)
    before = load_prompt_cache(tmp_path / "cache", model, TOKENIZER)
    assert (before.ids, before.bits) == (LONG, bits)
    settings = {"settings": {"cache_bits": bits}}
    for prompt in (SHORT, [9], []):  # of an empty one, the last token is read once more
        plain = generated(model, [LONG + prompt], **settings)
        assert len(set(plain[0])) > 3
        assert generated(model, [prompt], prefix=before) == plain


def test_it_works_with_batches_drafts_and_sliding(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    before = load_prompt_cache(tmp_path / "cache", model, TOKENIZER)
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
    save_prompt_cache(tmp_path / "cache", run.decoder, TOKENIZER, LONG)
    assert generated(model, [SHORT], prefix=load_prompt_cache(tmp_path / "cache", model, TOKENIZER)) == generated(
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
    generated(
        model, [SHORT], prefix=load_prompt_cache(tmp_path / "cache", model, TOKENIZER), settings={"max_tokens": 1}
    )
    assert lengths == [len(SHORT)]


def test_the_saved_text_counts_towards_the_context(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    before = load_prompt_cache(tmp_path / "cache", model, TOKENIZER)
    with pytest.raises(UsageError, match="the prompt is 48 tokens long and the model's context is 48"):
        generated(model, [[1] * 28], prefix=before)


def test_a_model_that_differs_in_one_weight_is_refused(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    nearly = new_model()
    nearly.ln_f.bias = nearly.ln_f.bias.at[3].add(1e-7)
    for other in (new_model(1), nearly):
        with pytest.raises(UsageError, match="this prompt was read by another model"):
            load_prompt_cache(tmp_path / "cache", other, TOKENIZER)
    assert fingerprint(new_model(), TOKENIZER) == fingerprint(model, TOKENIZER)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model, file = new_model(), tmp_path / "cache"
    with pytest.raises(ModelFolderError, match="found no such file"):
        load_prompt_cache(file, model, TOKENIZER)
    kept(model, file, LONG)
    whole = file.read_bytes()
    for damaged in (b"", b"hello", whole[:-10], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ModelFolderError, match="expected a whole safetensors file"):
            load_prompt_cache(file, model, TOKENIZER)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros((2,))})
    with pytest.raises(UsageError, match="expected what --save-prompt-cache wrote"):
        load_prompt_cache(tmp_path / "other.safetensors", model, TOKENIZER)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.pop(name)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.update({name: change(found[name])})


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (without("ids"), r"ids of shape \(0,\) and mlx.core.float32"),
    "ids of no text": (changed("ids", lambda ids: ids[:0]), r"ids of shape \(0,\)"),
    "ids of another shape": (changed("ids", lambda ids: ids[None]), r"ids of shape \(1, 20\)"),
    "ids as floats": (changed("ids", lambda ids: ids.astype(mx.float32)), "ids of shape .* and mlx.core.float32"),
    "ids past the vocabulary": (changed("ids", lambda ids: ids + 200), "ids that are not between 0 and 256"),
    "negative ids": (changed("ids", lambda ids: ids - 101), "ids that are not between 0 and 256"),
    "more ids than positions": (changed("ids", lambda ids: mx.tile(ids, 3)), r"ids of shape \(60,\)"),
    "one id less": (changed("ids", lambda ids: ids[:-1]), r"h.0.keys.0: .*\(1, 2, 20, 32\), not .*\(1, 2, 19, 32\)"),
    "no keys of a layer": (without("h.1.keys.0"), "h.1.keys.0: no such array, not mlx.core.float32 of shape"),
    "a layer more": (lambda x: x.update({"h.2.keys.0": x["h.1.keys.0"]}), "h.2.keys.0: .*, not no such array"),
    "values one token short": (changed("h.1.values.0", lambda x: x[:, :, :-1]), "h.1.values.0: .*, not .*"),
    "a head less": (changed("h.0.keys.0", lambda x: x[:, :1]), "h.0.keys.0: .*, not .*"),
    "keys as bool": (changed("h.0.keys.0", lambda x: x.astype(mx.bool_)), "h.0.keys.0: .*bool of .*, not .*float32"),
    "keys in half precision": (changed("h.0.keys.0", lambda x: x.astype(mx.float16)), "h.0.keys.0: .*float16"),
    "nan": (changed("h.0.keys.0", lambda x: x.at[0, 1, 3, 5].multiply(mx.nan)), "h.0.keys.0: nan or an infinity"),
    "infinity": (changed("h.1.values.0", lambda x: x / 0), "h.1.values.0: nan or an infinity"),
    "no bits": (without("bits"), "cache-bits of None"),
    "bits of no number": (changed("bits", lambda _: "x"), "cache-bits of 'x'"),
    "bits of another storage": (changed("bits", lambda _: "8"), "h.0.keys.0: .*float32 .*, not .*uint32"),
}


@pytest.mark.parametrize(("damage", "found"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_cache_is_checked_whole(damage: Callable[[dict[str, Any]], Any], found: str, tmp_path: Path) -> None:
    model, file = new_model(), tmp_path / "cache.safetensors"
    kept(model, file, LONG)
    arrays, metadata = mx.load(str(file), return_metadata=True)  # type: ignore[misc]
    both = arrays | metadata
    damage(both)
    arrays = {name: value for name, value in both.items() if isinstance(value, mx.array)}
    metadata = {name: both[name] for name in metadata if name in both} | {"sha256": hash_of(arrays)}
    mx.save_safetensors(str(file), arrays, metadata)
    with pytest.raises(ModelFolderError, match=f"expected a whole prompt cache, found {found}.*; save it again"):
        load_prompt_cache(file, model, TOKENIZER)


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_every_changed_bit_is_noticed(tmp_path: Path, bits: int | None) -> None:
    model, file = new_model(), tmp_path / "cache"
    kept(model, file, LONG, cache_bits=bits)
    whole = file.read_bytes()
    for i in range(len(whole) - 1, 0, -len(whole) // 50):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises((ModelFolderError, UsageError)):
            load_prompt_cache(file, model, TOKENIZER)


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model = new_model()
    kept(model, tmp_path / "cache", LONG)
    other = Tokenizer(dict(zip(TOKENIZER.ranks, reversed(TOKENIZER.ranks.values()), strict=True)), TOKENIZER.specials)
    with pytest.raises(UsageError, match="read by another model or tokenizer"):
        load_prompt_cache(tmp_path / "cache", model, other)


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
