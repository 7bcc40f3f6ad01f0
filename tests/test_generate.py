"""Generation: each sampling rule keeps what it promises, and the cached, streamed path says what the plain one says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.decode import generate, generate_many, generate_tokens
from mlx_gpt.generate.sampling import greedy, keep_top_k, keep_top_p, keep_vocabulary, make_sampler
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
EOT = TOKENIZER.eot_id
SMALL = GPTConfig(vocab_size=257, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
P = np.array([0.05, 0.4, 0.1, 0.3, 0.15])  # probabilities of five ids; by rank: 1, 3, 4, 2, 0


def logits_of(*rows: Any) -> mx.array:
    return mx.array(np.log(np.stack(rows)).astype(np.float32))


def kept(logits: mx.array) -> list[set[int]]:
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in np.array(logits)]


def new_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(config).eval()


# Sampling rules


def test_top_k_keeps_the_k_most_probable_and_no_other() -> None:
    logits = logits_of(P, P[::-1])
    assert kept(keep_top_k(logits, 1)) == [{1}, {3}]
    assert kept(keep_top_k(logits, 3)) == [{1, 3, 4}, {3, 1, 0}]
    assert kept(keep_top_k(logits, 5)) == kept(keep_top_k(logits, 99)) == [set(range(5))] * 2
    assert mx.array_equal(keep_top_k(logits, 5), logits)


def test_top_k_keeps_those_as_probable_as_the_kth() -> None:
    assert kept(keep_top_k(logits_of([0.1, 0.3, 0.3, 0.3]), 2)) == [{1, 2, 3}]


@pytest.mark.parametrize(
    ("p", "nucleus"),
    [
        (1e-9, {1}),  # the first always stays
        (0.39, {1}),
        (0.41, {1, 3}),  # 0.4 does not reach it, 0.7 does
        (0.69, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.86, {1, 3, 4, 2}),
        (0.96, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, nucleus: set[int]) -> None:
    assert kept(keep_top_p(logits_of(P, P[::-1]), p)) == [nucleus, {4 - i for i in nucleus}]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_rules_keep_as_few_as_they_may_of_any_distribution(seed: int, k: int, p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(1, 12)).astype(np.float32) * 3
    probabilities = np.exp(logits[0].astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-logits[0])
    assert kept(keep_top_k(mx.array(logits), k)) == [set(order[:k].tolist())]
    sums = np.cumsum(probabilities[order])
    if np.abs(sums - p).min() > 1e-5:  # where rounding does not decide
        assert kept(keep_top_p(mx.array(logits), p)) == [set(order[: np.searchsorted(sums, p) + 1].tolist())]


def test_rules_leave_what_they_keep_as_it_was() -> None:
    logits = logits_of(P)
    for ruled in (keep_top_k(logits, 3), keep_top_p(logits, 0.8), keep_vocabulary(logits, 4)):
        same = np.array(ruled == logits)[0]
        assert set(np.flatnonzero(same).tolist()) == kept(ruled)[0]


def test_ids_beyond_the_vocabulary_are_forbidden() -> None:
    assert kept(keep_vocabulary(logits_of(P), 3)) == [{0, 1, 2}]


# Drawing


def drawn(sampler: Callable[[mx.array], mx.array], p: Any = P, n: int = 10_000, seed: int = 0) -> np.ndarray:
    mx.random.seed(seed)
    return np.bincount(np.array(sampler(mx.broadcast_to(logits_of(p), (n, len(p))))), minlength=len(p))


def chi_square(counts: np.ndarray, p: Any) -> float:
    expected = counts.sum() * np.asarray(p)
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 23.5  # chi-square with 4 degrees of freedom is larger once in ten thousand


def normal(p: Any) -> Any:
    return np.asarray(p) / np.sum(p)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, normal(P**2)),
        ({"temperature": 2.0}, normal(P**0.5)),
        ({"top_k": 3}, normal([0, 0.4, 0, 0.3, 0.15])),
        ({"top_p": 0.8}, normal([0, 0.4, 0, 0.3, 0.15])),
        ({"vocab_size": 3}, normal([0.05, 0.4, 0.1, 0, 0])),
        ({"vocab_size": 4, "temperature": 0.5, "top_k": 2}, normal([0, 0.16, 0, 0.09, 0])),
    ],
    ids=str,
)
def test_ten_thousand_draws_follow_the_distribution(settings: dict[str, Any], expected: np.ndarray) -> None:
    counts = drawn(make_sampler(**settings))
    possible = np.asarray(expected) > 0
    assert counts[~possible].sum() == 0  # what is forbidden is never drawn
    assert chi_square(counts[possible], expected[possible]) < LIMIT
    assert chi_square(counts, P) > LIMIT or not settings  # and the test can tell


def test_temperature_comes_before_top_p_and_top_k_before_top_p() -> None:
    # At temperature 0.5 the probabilities are P², in shares .525 .295 .074 .033 .008: 0.8 takes two. At 1 it would
    # take three.
    assert set(np.flatnonzero(drawn(make_sampler(0.5, top_p=0.8)))) == {1, 3}
    # Of the two most probable, 0.4 and 0.3, the first has 0.57 of what is left, which reaches 0.5.
    assert set(np.flatnonzero(drawn(make_sampler(top_k=2, top_p=0.5)))) == {1}
    # The vocabulary comes first: of ids 0 to 2 the two most probable are 1 and 2.
    assert set(np.flatnonzero(drawn(make_sampler(top_k=2, vocab_size=3)))) == {1, 2}


def test_temperature_0_takes_the_most_probable_and_draws_nothing() -> None:
    mx.random.seed(0)
    before = mx.array(mx.random.state[0])
    assert make_sampler(0.0)(logits_of(P, P[::-1])).tolist() == [1, 3] == greedy(logits_of(P, P[::-1])).tolist()
    assert make_sampler(0.0, vocab_size=1)(logits_of(P)).tolist() == [0]
    assert mx.array_equal(mx.random.state[0], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or above, not -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": -1}, r"top-k must be 0 \(off\) or a number of ids, not -1"),
        ({"top_p": 0.0}, r"top-p must be above 0 and at most 1 \(off\), not 0.0"),
        ({"top_p": 1.1}, "top-p must be above 0"),
        ({"top_p": float("nan")}, "top-p must be above 0"),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_sampler(**settings)


# Token by token


def continued(model: GPT, prompt: list[int], n: int) -> list[int]:
    """The greedy continuation, each time with the whole sequence and no cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(mx.argmax(model([ids])[0, -1]).item()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [[65], [65, 66, 67], list(range(20))])
def test_the_cached_continuation_is_the_uncached_one(prompt: list[int]) -> None:
    model = new_model()
    n = 24 - len(prompt) + 1
    by_hand = continued(model, prompt, n)
    assert len(set(by_hand)) > 2  # a model that repeats one token would prove little
    assert list(generate_tokens(model, prompt, greedy, max_tokens=n)) == by_hand
    assert list(generate_tokens(model, prompt, greedy, max_tokens=3)) == by_hand[:3]


def test_generation_ends_where_the_context_is_full() -> None:
    model = new_model()
    for length in (1, 23, 24):
        ids = list(generate_tokens(model, [65] * length, greedy, max_tokens=1000))
        assert len(ids) == 24 - length + 1  # the last one is drawn at the last position and is not looked at
    assert list(generate_tokens(model, [65], greedy, max_tokens=0)) == []


def test_the_stop_id_ends_the_text_and_is_not_part_of_it() -> None:
    model = new_model()
    whole = continued(model, [65], 10)
    stop = whole[4]
    assert list(generate_tokens(model, [65], greedy, 10, stop_id=stop)) == whole[: whole.index(stop)]


def test_generation_is_without_dropout() -> None:
    model = new_model(replace(SMALL, embd_pdrop=0.5, resid_pdrop=0.5))
    by_hand = continued(model, [65], 8)
    model.train()
    assert list(generate_tokens(model, [65], greedy, 8)) == by_hand
    model.train()
    assert generate_many(model, [65], 2, greedy, 8, stop_id=-1) == [by_hand] * 2


# Side by side


def test_rows_side_by_side_are_those_drawn_one_at_a_time() -> None:
    model = new_model()
    alone = list(generate_tokens(model, [65, 66], greedy, 15))
    assert generate_many(model, [65, 66], 3, greedy, 15, stop_id=-1) == [alone] * 3
    assert generate_many(model, [65, 66], 1, greedy, 1000, stop_id=-1) == [continued(model, [65, 66], 23)]
    assert generate_many(model, [65, 66], 2, greedy, 0, stop_id=-1) == [[], []]


def test_each_row_side_by_side_ends_at_its_own_stop_id() -> None:
    model, rows = new_model(), [[5, 6, EOT, 7, 8], [EOT, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    said = iter(mx.array(column) for column in zip(*rows, strict=True))
    assert generate_many(model, [65], 3, lambda logits: next(said), 5, EOT) == [[5, 6], [], [1, 2, 3, 4, 5]]


def test_side_by_side_ends_as_soon_as_every_row_has_ended() -> None:
    calls = []

    def sampler(logits: mx.array) -> mx.array:
        calls.append(logits.shape)
        return mx.array([EOT, len(calls)] if len(calls) < 3 else [7, EOT])

    assert generate_many(new_model(), [65], 2, sampler, 20, EOT) == [[], [1, 2]]
    assert calls == [(2, 257)] * 3


def test_rows_side_by_side_differ_when_they_are_drawn() -> None:
    mx.random.seed(0)
    rows = generate_many(new_model(), [65], 8, make_sampler(1.0), 10, stop_id=-1)
    assert len({tuple(row) for row in rows}) > 1


# Text


class Says:
    """A model that says one id after the other, whatever it reads."""

    def __init__(self, ids: list[int], n_positions: int = 100):
        self.config = replace(SMALL, n_positions=n_positions)
        self.ids = iter(ids)

    def eval(self) -> None:
        pass

    def make_cache(self) -> None:
        return None

    def __call__(self, tokens: Any, cache: None) -> mx.array:
        return mx.where(mx.arange(257) == next(self.ids, 0), 0.0, -100.0)[None, None]  # (1, 1, V)


def pieces_said(text: bytes, **settings: Any) -> list[str]:
    model: Any = Says([TOKENIZER.ranks[bytes([b])] for b in text] + [EOT])
    return list(generate(model, TOKENIZER, "x", temperature=0, **settings))


def test_a_stream_yields_whole_characters_only() -> None:
    assert pieces_said("aé🙂中!".encode()) == ["a", "é", "🙂", "中", "!"]


def test_a_character_that_is_cut_off_is_marked() -> None:
    assert pieces_said("a🙂".encode()[:-1]) == ["a", "\ufffd"]
    assert pieces_said("a🙂".encode(), max_tokens=3) == ["a", "\ufffd"]
    assert pieces_said(b"a\xffb") == ["a", "\ufffd", "b"]


def test_text_ends_at_the_mark_and_the_mark_is_not_in_it() -> None:
    assert "".join(pieces_said(b"The end.")) == "The end."


def test_the_pieces_are_the_text_of_the_continuation() -> None:
    model = new_model()
    ids = continued(model, TOKENIZER.encode("ab"), 22)
    ids = ids[: ids.index(EOT)] if EOT in ids else ids
    assert "".join(generate(model, TOKENIZER, "ab", temperature=0)) == TOKENIZER.decode(ids)


def test_an_empty_prompt_starts_a_new_text() -> None:
    model = new_model()
    ids = continued(model, [EOT], 10)
    ids = ids[: ids.index(EOT)] if EOT in ids else ids
    assert "".join(generate(model, TOKENIZER, "", max_tokens=10, temperature=0)) == TOKENIZER.decode(ids)


def test_ids_that_the_tokenizer_lacks_are_never_said() -> None:
    model = new_model(replace(SMALL, vocab_size=600))  # padded: more than half of the ids mean nothing
    for seed in range(20):
        "".join(generate(model, TOKENIZER, "a", temperature=2.0, seed=seed))  # to decode one would be a ValueError
    mx.random.seed(0)
    unruly = Counter(id >= 257 for row in generate_many(model, [65], 8, make_sampler(2.0), 20, -1) for id in row)
    assert unruly[True] > 20  # the model wants to


def test_the_same_seed_says_the_same_and_another_something_else() -> None:
    model = new_model()
    said = ["".join(generate(model, TOKENIZER, "a", temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_prompt_longer_than_the_context_is_told_with_both_lengths_before_anything_is_said() -> None:
    model = new_model()
    with pytest.raises(
        UsageError, match="the prompt is 24 tokens long and the model's context is 24; shorten it to at"
    ):
        generate(model, TOKENIZER, "a" * 24)
    assert len(TOKENIZER.encode("".join(generate(model, TOKENIZER, "a" * 23, temperature=0)))) <= 2


@pytest.mark.parametrize(("settings", "message"), [({"max_tokens": -1}, "max-tokens"), ({"seed": -1}, "seed")])
def test_settings_are_checked_before_anything_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"{message} must be 0 or above.*not -1"):
        generate(new_model(), TOKENIZER, "a", **settings)
