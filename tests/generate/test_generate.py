"""Generation: the cached, compiled, streamed path equals the plain one; text has whole characters and ends in time."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import LOOKUP, Generation, generate, generate_tokens
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.writer import Token, Writer, before_stop
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
END = TOKENIZER.eot_id
SMALL = GPTConfig(vocab_size=257, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)


def new_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(config).eval()


def continued(model: GPT, prompt: list[int], n: int) -> list[int]:
    """The greedy continuation, each time with the whole sequence and no cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(mx.argmax(model([ids])[0, -1]).item()))
    return ids[len(prompt) :]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


def generated(model: GPT, prompt: list[int], n: int, **more: Any) -> list[int]:
    return list(generate_tokens(model, TOKENIZER, prompt, max_tokens=n, temperature=0, **more))


# Token by token


@pytest.mark.parametrize("prompt", [[65], [65, 66, 67], list(range(20))])
def test_the_cached_continuation_is_the_uncached_one(prompt: list[int]) -> None:
    model = new_model()
    n = 24 - len(prompt) + 1
    by_hand = continued(model, prompt, n)
    assert len(set(by_hand)) > 2  # a model that repeats one token would prove little
    assert END not in by_hand
    assert generated(model, prompt, n) == by_hand
    assert generated(model, prompt, 3) == by_hand[:3]


@pytest.mark.parametrize("growth", [1, 5, 8])
def test_a_growing_cache_changes_nothing(growth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gpt.model.cache.GROWTH", growth)
    model = new_model()
    assert generated(model, [65], 24) == continued(model, [65], 24)


def test_generation_ends_where_the_context_is_full() -> None:
    model = new_model()
    for length in (1, 22, 23):
        run = Generation(model, TOKENIZER, [[65] * length], GenerationSettings(temperature=0, max_tokens=1000))
        assert len(list(run)) == 24 - length + 1  # the last token is not read
        assert run.reasons == ["context"]
    assert generated(model, [65], 0) == []


def test_a_sliding_context_reads_its_last_half_again() -> None:
    model = new_model()
    ids = [65, 66, 67]
    while len(ids) < 3 + 60:
        window = ids if len(ids) <= 24 else ids[-(12 + (len(ids) - 25) % 13) :]  # 12 read again, then up to 24
        ids.append(int(mx.argmax(model([window])[0, -1]).item()))
    assert generated(model, ids[:3], 60, context="slide") == ids[3:]
    assert generated(model, ids[:3], 60) == ids[3 : 3 + 22]


def test_no_position_exceeds_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked_at = new_model(), []
    positions = model._positions

    def spy(T: int, cache: Any) -> mx.array:
        found = positions(T, cache)
        if isinstance(cache[0].offset, int):  # outside of the compiled step, where values can be looked at
            looked_at.extend(np.array(found).ravel().tolist())
        return found

    monkeypatch.setattr(GPT, "_positions", lambda self, T, cache: spy(T, cache))
    generated(model, [65], 100, context="slide")
    assert max(looked_at) < 24
    assert len(looked_at) > 1 + 5 * 12


def test_endoftext_ends_the_text_and_is_not_part_of_it() -> None:
    model = new_model()
    whole = continued(model, [65], 10)
    other = Tokenizer({token: i for token, i in TOKENIZER.ranks.items() if i != whole[4]}, {"<|endoftext|>": whole[4]})
    run = Generation(model, other, [[65]], GenerationSettings(temperature=0, max_tokens=10))
    assert [piece.token.id for _, piece in run if piece.token] == whole[: whole.index(whole[4])]
    assert run.reasons == ["end"]


def test_generation_is_without_dropout_and_uses_the_current_weights() -> None:
    model = new_model(replace(SMALL, embd_pdrop=0.5, resid_pdrop=0.5))
    by_hand = continued(model, [65], 8)
    model.train()
    assert generated(model, [65], 8) == by_hand
    model.update(new_model(seed=1).parameters())  # as further training would
    assert generated(model, [65], 8) == continued(model, [65], 8) != by_hand


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_in_fewer_bits_is_smaller_and_nearly_as_exact(bits: int) -> None:
    config = replace(SMALL, n_embd=64, n_positions=64, initializer_range=0.1)
    model = new_model(config)
    prompt = list(range(40))

    def logits_and_size(bits: int | None) -> tuple[np.ndarray, int]:
        run = Generation(model, TOKENIZER, [prompt], GenerationSettings(cache_bits=bits))
        run.decoder.prefill(run.prompts)
        logits = run.decoder.step(mx.array([[7]]))[:, -1]
        kept = [part for layer in run.decoder.cache for part in (*layer.keys, *layer.values)]
        return np.array(logits), sum(part.nbytes for part in kept)

    exact, full = logits_and_size(None)
    found, size = logits_and_size(bits)
    assert size == full * {16: 1 / 2, 8: (8 + 2) / 32, 4: (4 + 2) / 32}[bits]  # of 32 numbers, a scale and a bias
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 0 < error < {16: 1e-3, 8: 1e-2, 4: 0.1}[bits]


def test_a_quantized_cache_needs_a_head_width_divisible_by_32() -> None:
    with pytest.raises(UsageError, match="cache-bits 8 needs heads whose width is a multiple of 32"):
        generate(new_model(), TOKENIZER, "a", cache_bits=8)


def test_an_abandoned_generation_leaves_nothing_pending() -> None:
    model = new_model()
    pieces = generate(model, TOKENIZER, "a", temperature=0)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    gc.collect()
    assert generated(model, [65], 5) == continued(model, [65], 5)


# Log-probabilities


def test_each_token_has_its_logprob_and_the_most_probable_alternatives() -> None:
    model = new_model()
    choice = GenerationSettings(max_tokens=8, temperature=2.0, top_k=20, seed=1)
    run = Generation(model, TOKENIZER, [[65, 66]], replace(choice, logprobs=3))
    tokens = [piece.token for _, piece in run if piece.token]
    ids = [65, 66]
    for token in tokens:
        logits = np.array(model([ids])[0, -1]).astype(np.float64)
        logp = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()  # the model's own, before any rule
        assert token.logprob == pytest.approx(logp[token.id], abs=1e-4)
        best = np.argsort(-logp)[:3]
        assert [i for i, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(logp[best], abs=1e-4)
        ids.append(token.id)
    plain = Generation(model, TOKENIZER, [[65, 66]], choice)
    assert [piece.token.id for _, piece in plain if piece.token] == ids[2:]  # to look changes nothing


@pytest.mark.parametrize("n", [0, 257, 1000])
def test_the_number_of_alternatives_is_limited_by_the_vocabulary(n: int) -> None:
    run = Generation(new_model(), TOKENIZER, [[65]], GenerationSettings(max_tokens=2, logprobs=n))
    assert [len(piece.token.top) for _, piece in run if piece.token] == [min(n, 257)] * 2


# Text


def written(ids: Iterable[int], limit: int = 1000, **given: Any) -> tuple[list[str], str | None]:
    """The pieces of text that a writer makes of these ids, and why it ended."""
    writer = Writer(TOKENIZER, GenerationSettings(max_tokens=1000, **given), limit)
    pieces = [piece.text for i in ids for piece in writer.push(Token(i))]
    return [text for text in pieces if text], writer.reason


def bytes_of(text: bytes) -> list[int]:
    return [TOKENIZER.ranks[bytes([b])] for b in text]


def test_a_stream_yields_whole_characters_only() -> None:
    assert written([*bytes_of("aé🙂中!".encode()), END, 65]) == (["a", "é", "🙂", "中", "!"], "end")


def test_an_incomplete_character_becomes_ufffd() -> None:
    assert written([*bytes_of("a🙂".encode()[:-1]), END]) == (["a", "\ufffd"], "end")
    assert written(bytes_of("a🙂".encode()), limit=3) == (["a", "\ufffd"], "context")
    assert written([*bytes_of(b"a\xffb"), END])[0] == ["a", "\ufffd", "b"]


WORDS = Tokenizer.train(["the cat sat. the cat ran. the dog sat.\n\n"] * 9, 270)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("the cat sat. the dog", (" dog",), "the cat sat. the"),
        ("the cat sat. the dog", ("t. th",), "the cat sa"),  # begins and ends inside of tokens
        ("the cat sat. the dog", ("the",), ""),
        ("the cat sat. the dog", ("dogs", "doggy"), "the cat sat. the dog"),  # only begun: shown in the end
        ("the cat sat. the dog", ("cat sat", "sat"), "the "),
        ("aaab", ("aab",), "a"),
        ("aé🙂b", ("🙂",), "aé"),
        ("aé🙂b", ("\ufffd",), "aé🙂b"),
    ],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, WORDS], ids=["bytes", "words"])
def test_text_ends_before_a_stop_string_wherever_tokens_end(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], shown: str
) -> None:
    writer = Writer(tokenizer, GenerationSettings(stop=stops), 200)
    pieces: list[str] = []
    for i in [*tokenizer.encode(text), tokenizer.eot_id]:
        pieces += [piece.text for piece in writer.push(Token(i))]
        assert shown.startswith("".join(pieces))  # at no moment more than in the end
    assert "".join(pieces) == shown
    assert writer.reason == ("end" if shown == text else "stop")


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_shown_text_contains_no_stop_string_however_it_is_split(text: str, stops: list[str], data: Any) -> None:
    held, shown, rest, found = "", "", text, False
    while rest and not found:
        n = data.draw(st.integers(1, len(rest)))
        held, rest = held + rest[:n], rest[n:]
        free, found = before_stop(held, stops)
        shown, held = shown + held[:free], held[free:]
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown + held)
    assert found == any(stop in text for stop in stops)
    assert not found or any(held.startswith(stop) for stop in stops)


def test_held_tokens_are_released_with_their_own_text() -> None:
    writer = Writer(WORDS, GenerationSettings(stop=("cat sat on",)), 200)
    ids = WORDS.encode("the cat sat. the")
    pieces = [piece for i in ids for piece in writer.push(Token(i))] + writer.push(Token(WORDS.eot_id))
    assert [piece.token.id for piece in pieces if piece.token] == ids
    assert [piece.text for piece in pieces] == [WORDS.decode([i]) for i in ids]


def test_the_pieces_are_the_text_of_the_continuation() -> None:
    model = new_model()
    ids = until_end(continued(model, TOKENIZER.encode("ab"), 22))
    assert "".join(generate(model, TOKENIZER, "ab", temperature=0)) == TOKENIZER.decode(ids)


def test_an_empty_prompt_starts_a_new_text() -> None:
    model = new_model()
    ids = until_end(continued(model, [END], 10))
    assert "".join(generate(model, TOKENIZER, "", max_tokens=10, temperature=0)) == TOKENIZER.decode(ids)


def test_endoftext_written_in_a_prompt_is_the_special_token() -> None:
    model = new_model(replace(SMALL, n_positions=64))
    ids = [TOKENIZER.eot_id, TOKENIZER.ranks[b"a"]]
    assert "".join(generate(model, TOKENIZER, "<|endoftext|>a", temperature=0, max_tokens=20)) == TOKENIZER.decode(
        until_end(continued(model, ids, 20))
    )


def test_ids_unknown_to_the_tokenizer_are_never_generated() -> None:
    model = new_model(replace(SMALL, vocab_size=600))  # padded: more than half of the ids mean nothing
    wished = np.array(mx.argmax(model([[i] for i in range(200)])[:, -1], axis=-1))
    assert (wished >= 257).sum() > 20  # the model wants to
    for seed in range(10):
        assert max(generate_tokens(model, TOKENIZER, [65], temperature=2.0, seed=seed), default=0) < 257


def test_the_seed_determines_the_text() -> None:
    model = new_model()
    texts = ["".join(generate(model, TOKENIZER, "a", temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# Refused input


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths() -> None:
    model = new_model()
    with pytest.raises(UsageError, match="the prompt is 24 tokens long and the model's context is 24; shorten it"):
        generate(model, TOKENIZER, "a" * 24)
    assert len(TOKENIZER.encode("".join(generate(model, TOKENIZER, "a" * 23, temperature=0)))) <= 2


@pytest.mark.parametrize("draft", [None, LOOKUP, "model"])
@pytest.mark.parametrize("length", [23, 24, 25, 90])
def test_a_context_that_slides_reads_the_end_of_a_longer_prompt(length: int, draft: Any) -> None:
    model = new_model()
    prompts = [[(7 * i + row) % 256 for i in range(length)] for row in range(1 if draft else 2)]
    settings = GenerationSettings(context="slide", temperature=0, max_tokens=40, min_tokens=40, logprobs=2)
    found, cut = (
        Generation(model, TOKENIZER, rows, settings, model if draft == "model" else draft)
        for rows in (prompts, [row[-23:] for row in prompts])
    )
    assert list(found) == list(cut)
    assert (found.n_dropped, cut.n_dropped) == (length - 23, 0)


@pytest.mark.parametrize("given", [{"max_tokens": -1}, {"top_p": 2}, {"logit_bias": {999: 1}}], ids=str)
def test_settings_are_checked_before_generation(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        generate(new_model(), TOKENIZER, "a", **given)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 256"):
        generate_tokens(new_model(), TOKENIZER, [257])


def test_rules_that_mask_all_tokens_are_named() -> None:
    length = {"min_tokens": 300, "max_tokens": 300, "context": "slide"}  # of 257 ids
    forever: dict[str, Any] = {"no_repeat_ngram": 1} | length
    generated: list[int] = []
    with pytest.raises(UsageError, match="all tokens are masked by --no-repeat-ngram and --min-tokens;"):
        generated.extend(generate_tokens(new_model(), TOKENIZER, [65], **forever))
    assert sorted(generated) == [i for i in range(256) if i != 65]  # every other id


def test_min_tokens_forbids_stop_token_ids_too() -> None:
    model = new_model()
    ids = generated(model, [65], 12)
    stop = {"stop_token_ids": (ids[2],)}
    assert generated(model, [65], 12, **stop) == ids[: ids.index(ids[2])]
    longer = generated(model, [65], 12, **stop, min_tokens=8)
    assert len(longer) >= 8
    assert ids[2] not in longer
    with pytest.raises(UsageError, match="stop_token_ids: no token has id 300"):
        generated(model, [65], 12, stop_token_ids=(300,), min_tokens=8)
