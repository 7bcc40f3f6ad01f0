"""Batches: each row equals the same row alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.decoder import Decoder, pad_rows
from mlx_gpt.generate.generation import Generation, generate, generate_many
from mlx_gpt.generate.rng import key_at, row_keys
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
SMALL = GPTConfig(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
PROMPTS = ["a", "a longer one", "", "zz", "the longest of them all"]


@pytest.fixture(scope="module")
def model() -> GPT:
    mx.random.seed(0)
    return GPT(SMALL).eval()


def alone(model: GPT, prompt: str, **settings: Any) -> str:
    return "".join(generate(model, TOKENIZER, prompt, **settings))


@pytest.mark.parametrize("length", [1, 3, 8])
def test_logits_beside_longer_rows_are_those_alone(model: GPT, length: int) -> None:
    rows = [list(range(length)), list(range(20, 32)), [9]]
    decoder = Decoder(model)
    found = np.array(decoder.prefill(pad_rows(rows, 257)))
    for i, row in enumerate(rows):
        assert found[i] == pytest.approx(np.array(model([row])[0, -1]), abs=1e-4)
    found = np.array(decoder.step(mx.array([[1, 2], [3, 4], [5, 6]])))  # two tokens at once
    for i, row in enumerate(rows):
        assert found[i] == pytest.approx(np.array(model([[*row, 2 * i + 1, 2 * i + 2]])[0, -2:]), abs=1e-4)


def test_padding_does_not_affect_a_row(model: GPT) -> None:
    decoder = Decoder(model)
    decoder.prefill(pad_rows([[1, 2], [3] * 9], 257))
    before = np.array(decoder.step(mx.array([[5], [5]])))
    decoder.rewind(1)
    for layer in decoder.cache:  # the slots of the padding
        layer.keys = tuple(part.at[0, :, :7].add(100.0) for part in layer.keys)
        layer.values = tuple(part.at[0, :, :7].add(100.0) for part in layer.values)
    assert np.array_equal(np.array(decoder.step(mx.array([[5], [5]]))), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "max_tokens": 7},
        {"temperature": 0, "repetition_penalty": 1.5, "no_repeat_ngram": 2, "min_tokens": 5},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "force": ("ox",), "ban": ("a",)},
        {"temperature": 0, "stop": ("\x00", "q", "\ufffd")},
        {"temperature": 0, "cache_bits": 16},
    ],
    ids=str,
)
def test_greedy_rows_are_those_alone_token_by_token(model: GPT, settings: dict[str, Any]) -> None:
    texts = generate_many(model, TOKENIZER, PROMPTS, **settings)
    assert texts == [alone(model, prompt, **settings) for prompt in PROMPTS]
    assert len(set(texts)) > 2


def test_a_row_draws_the_same_regardless_of_its_batch(model: GPT) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 4}
    texts = generate_many(model, TOKENIZER, PROMPTS, **settings)
    assert texts[0] == alone(model, PROMPTS[0], **settings)
    assert generate_many(model, TOKENIZER, PROMPTS[:3], **settings) == texts[:3]


def test_samples_of_one_prompt_differ(model: GPT) -> None:
    assert len(set(generate_many(model, TOKENIZER, ["a"] * 8, temperature=1.0, seed=0))) == 8
    again = generate_many(model, TOKENIZER, ["a"] * 8, temperature=1.0, seed=0)
    assert again == generate_many(model, TOKENIZER, ["a"] * 8, temperature=1.0, seed=0)


def test_each_row_fills_its_own_context(model: GPT) -> None:
    run = Generation(
        model, TOKENIZER, [[5] * 3, [5] * 30], GenerationSettings(temperature=0, max_tokens=1000, min_tokens=1000)
    )
    counts = [0, 0]
    for row, _ in run:
        counts[row] += 1
    assert counts == [32 - 3 + 1, 32 - 30 + 1]
    assert run.reasons == ["context"] * 2


def test_each_row_ends_for_its_own_reason(model: GPT) -> None:
    whole = Generation(model, TOKENIZER, [[1], [2], [3]], GenerationSettings(temperature=0, max_tokens=6))
    rows: list[list[int]] = [[], [], []]
    for row, piece in whole:
        if piece.token:
            rows[row].append(piece.token.id)
    assert rows[0] != rows[1]
    end = next(i for i in rows[0] if i not in rows[1])
    other = Tokenizer({t: i for t, i in TOKENIZER.ranks.items() if i != end}, {"<|endoftext|>": end})
    run = Generation(model, other, [[1], [2], [3]], GenerationSettings(temperature=0, max_tokens=6))
    cut: list[list[int]] = [[], [], []]
    for row, piece in run:
        if piece.token:
            cut[row].append(piece.token.id)
    assert cut == [ids[: ids.index(end)] if end in ids else ids for ids in rows]
    assert run.reasons[0] == "end"
    assert run.reasons[1] == "length"


def test_a_batch_ends_with_its_last_row(model: GPT) -> None:
    at_once = GenerationSettings(max_tokens=30, logit_bias={TOKENIZER.eot_id: 1000.0})
    run = Generation(model, TOKENIZER, [[1], [2, 3]], at_once)
    assert list(run) == []
    assert run.stats.steps == 1


def test_no_prompts_give_no_texts_and_zero_tokens_give_empty_ones(model: GPT) -> None:
    assert generate_many(model, TOKENIZER, []) == []
    assert generate_many(model, TOKENIZER, ["a", "bc"], max_tokens=0) == ["", ""]


def test_rows_can_be_kept_dropped_and_repeated(model: GPT) -> None:
    decoder = Decoder(model)
    rows = [[1, 2, 3], [4], [5, 6]]
    decoder.prefill(pad_rows(rows, 257))
    decoder.keep([2, 0, 2])
    found = np.array(decoder.step(mx.array([[7], [8], [9]])))[:, 0]
    for i, row in enumerate([[5, 6, 7], [1, 2, 3, 8], [5, 6, 9]]):
        assert found[i] == pytest.approx(np.array(model([row])[0, -1]), abs=1e-4)


def test_sliding_rows_must_have_one_length(model: GPT) -> None:
    with pytest.raises(UsageError, match="need prompts of one length"):
        generate_many(model, TOKENIZER, ["a", "bc"], context="slide")
    slid = generate_many(model, TOKENIZER, ["ab", "bc"], context="slide", temperature=0, max_tokens=70)
    assert slid == [alone(model, p, context="slide", temperature=0, max_tokens=70) for p in ("ab", "bc")]


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-4), (16, 2e-2)])
def test_rows_may_join_and_leave_a_running_batch(model: GPT, bits: int | None, tolerance: float) -> None:
    texts = [[1, 2, 3], [4], list(range(20, 29)), [5, 6]]
    running, new = Decoder(model, bits), Decoder(model, bits)
    for first, last in ((0, 2), (2, 3), (3, 4)):  # beside shorter ones, then beside longer ones
        new.prefill(pad_rows(texts[first:last], 257))
        running.join(new)
        found = np.array(running.step(mx.array([[7 + i] for i in range(last)])))[:, 0]
        for i in range(last):
            texts[i].append(7 + i)
            assert found[i] == pytest.approx(np.array(model([texts[i]])[0, -1]), abs=tolerance)
    running.keep([3, 0])
    assert running.padding.tolist() == [8, 5]  # type: ignore[union-attr]
    running.drop_slots(5)
    found = np.array(running.step(mx.array([[1], [2]])))[:, 0]
    assert running.offset == 7
    for i, row in enumerate([[*texts[3], 1], [*texts[0], 2]]):
        assert found[i] == pytest.approx(np.array(model([row])[0, -1]), abs=tolerance)


def test_each_row_draws_with_the_key_of_its_own_position() -> None:
    keys = row_keys(3, 3)
    apart = [key_at(keys, place)[row].tolist() for row, place in enumerate([4, 0, 9])]
    assert key_at(keys, np.array([4, 0, 9])).tolist() == apart
