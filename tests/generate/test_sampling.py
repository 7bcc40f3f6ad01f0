"""Sampling: each rule follows its definition, all together equal transformers, and draws follow the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, log, nan
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.make_fixture import tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gpt.errors import UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.generate.decoder import NO_TOKEN
from mlx_gpt.generate.history import History
from mlx_gpt.generate.rng import key_at, row_keys
from mlx_gpt.generate.sampler import Sampler, Vocabulary, no_token_error
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
END = TOKENIZER.eot_id
P = np.array([0.05, 0.4, 0.1, 0.3, 0.15])  # probabilities of five ids; by rank: 1, 3, 4, 2, 0


def logits_of(*rows: Any) -> mx.array:
    return mx.array(np.log(np.stack(rows)).astype(np.float32))


def kept(logits: mx.array) -> list[set[int]]:
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in np.array(logits)]


def ids_of(*rows: Sequence[int]) -> mx.array:
    return mx.array(np.array(rows, dtype=np.int32))


def normal(p: Any) -> Any:
    return np.asarray(p) / np.sum(p)


# Truncation


def test_top_k_keeps_the_k_most_probable_and_no_other() -> None:
    logits = logits_of(P, P[::-1])
    assert kept(sampling.keep_top_k(logits, 1)) == [{1}, {3}]
    assert kept(sampling.keep_top_k(logits, 3)) == [{1, 3, 4}, {3, 1, 0}]
    assert kept(sampling.keep_top_k(logits, 5)) == kept(sampling.keep_top_k(logits, 99)) == [set(range(5))] * 2
    assert mx.array_equal(sampling.keep_top_k(logits, 5), logits)


def test_ids_as_probable_as_the_last_are_kept_too() -> None:
    assert kept(sampling.keep_top_k(logits_of([0.1, 0.3, 0.3, 0.3]), 2)) == [{1, 2, 3}]
    assert kept(sampling.keep_top_p(logits_of([0.1, 0.3, 0.3, 0.3]), 0.5)) == [{1, 2, 3}]


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
    assert kept(sampling.keep_top_p(logits_of(P, P[::-1]), p)) == [nucleus, {4 - i for i in nucleus}]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_the_kept_ids_follow_the_definitions_for_any_distribution(seed: int, k: int, p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(1, 12)).astype(np.float32) * 3
    probabilities = normal(np.exp(logits[0].astype(np.float64)))

    def fewest_in(order: np.ndarray) -> list[set[int]] | None:
        sums = np.cumsum(probabilities[order])
        near = np.abs(sums - p).min() < 1e-5  # where rounding decides
        return None if near else [set(order[: np.searchsorted(sums, p) + 1].tolist())]

    falling = np.argsort(-logits[0])
    surprise = -np.log(probabilities)
    typical = np.argsort(np.abs(surprise - (probabilities * surprise).sum()))
    assert kept(sampling.keep_top_k(mx.array(logits), k)) == [set(falling[:k].tolist())]
    assert kept(sampling.keep_top_p(mx.array(logits), p)) == (
        fewest_in(falling) or kept(sampling.keep_top_p(mx.array(logits), p))
    )
    assert kept(sampling.keep_typical(mx.array(logits), p)) == (
        fewest_in(typical) or kept(sampling.keep_typical(mx.array(logits), p))
    )
    if np.abs(probabilities / probabilities.max() - p).min() > 1e-5:
        enough = np.flatnonzero(probabilities >= p * probabilities.max())
        assert kept(sampling.keep_min_p(mx.array(logits), p)) == [set(enough.tolist())]


def test_rules_do_not_change_the_logits_they_keep() -> None:
    logits = logits_of(P)
    for found in (
        sampling.keep_top_k(logits, 3),
        sampling.keep_top_p(logits, 0.8),
        sampling.keep_min_p(logits, 0.5),
        sampling.keep_typical(logits, 0.5),
        sampling.block_ngrams(logits, ids_of([3, 1, 3]), 2),
        sampling.ban_sequences(logits, ids_of([3]), [[2], [3, 4], [1, 0]]),
    ):
        same = np.array(found == logits)[0]
        assert 0 < same.sum() < 5
        assert set(np.flatnonzero(same).tolist()) == kept(found)[0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 0.01, 0.5, 2.0, 1e30])
def test_temperature_divides_and_never_overflows(temperature: float) -> None:
    exact = np.exp((np.log(P) - np.log(P).max()) / temperature)
    found = mx.softmax(sampling.with_temperature(logits_of(P), temperature))
    assert np.array(found)[0] == pytest.approx(normal(exact), abs=1e-6)


# Rules that depend on the history


def test_ids_are_counted_and_padding_is_not() -> None:
    counts = sampling.count_ids(ids_of([0, 2, 2, 4], [-1, -1, 3, 3]), 5)
    assert counts.tolist() == [[1, 0, 2, 0, 1], [0, 0, 0, 2, 0]]


def test_penalties_by_hand() -> None:
    logits = mx.array([[2.0, -2.0, 1.0, -1.0]])
    text = ids_of([-1, 0, 1, 1])
    assert sampling.penalize_repetition(logits, text, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]
    assert sampling.penalize_presence(logits, text, 0.5).tolist() == [[1.5, -2.5, 1.0, -1.0]]
    assert sampling.penalize_frequency(logits, text, 0.5).tolist() == [[1.5, -3.0, 1.0, -1.0]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_only_ids_that_would_repeat_an_ngram_are_blocked(text: list[int], padding: int, n: int) -> None:
    runs = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    last = text[len(text) - n + 1 :]
    allowed = {i for i in range(3) if len(last) < n - 1 or (*last, i) not in runs}
    row = [-1] * padding + text
    assert kept(sampling.block_ngrams(mx.zeros((1, 3)), ids_of(row), n)) == [allowed]
    together = sampling.block_ngrams(mx.zeros((2, 3)), ids_of(row, [-1] * len(row)), n)
    assert kept(together) == [allowed, {0, 1, 2}]  # a row does not see the others


def test_the_last_id_of_a_banned_sequence_is_forbidden() -> None:
    logits, text = mx.zeros((2, 5)), ids_of([0, 1, 2], [2, 1, 0])
    assert kept(sampling.ban_sequences(logits, text, [[4]])) == [{0, 1, 2, 3}] * 2
    assert kept(sampling.ban_sequences(logits, text, [[2, 3], [1, 0]])) == [{0, 1, 2, 4}, set(range(5))]
    assert kept(sampling.ban_sequences(logits, text, [[1, 2, 3], [0, 0, 0, 0]])) == [{0, 1, 2, 4}, set(range(5))]


def forced(sequences: list[list[int]], n: int, wish: Callable[[list[int]], int]) -> list[int]:
    """Generate at most n tokens: the wish if it is allowed, else the lowest allowed id."""
    text: list[int] = []
    for left in range(n, 0, -1):
        new = mx.zeros((1, 0), mx.int32) if not text else ids_of(text)
        found = sampling.force_sequences(mx.zeros((1, 10)), new, sequences, [9], mx.array([[left]]))
        (allowed,) = kept(found)
        text.append(wish(text) if wish(text) in allowed else min(allowed))
        if text[-1] == 9:
            break
    return text


def test_forced_words_are_generated_at_the_latest_in_the_last_tokens() -> None:
    words = [[1, 2, 3], [1, 1, 4]]
    assert forced(words, 6, lambda text: 9) == [1, 2, 3, 1, 1, 4]  # no room for anything else
    assert forced(words, 8, lambda text: 9) == [0, 0, 1, 2, 3, 1, 1, 4]  # the end is delayed
    assert forced(words, 8, lambda text: 5) == [5, 5, 1, 2, 3, 1, 1, 4]
    own = [1, 1, 4, 7, 9]  # one of them occurs unforced
    assert forced(words, 9, lambda text: own[len(text)] if len(text) < 5 else 9) == [1, 1, 4, 7, 0, 0, 1, 2, 3]
    both = [1, 2, 3, 1, 1, 4, 9]
    assert forced(words, 9, lambda text: both[len(text)]) == both  # then it may end


def test_a_forced_word_already_begun_is_completed() -> None:
    begun = [5, 1, 1, 5, 5]
    assert forced([[1, 1, 4]], 5, lambda text: begun[len(text)]) == [5, 1, 1, 4, 5]


# Composition


def history_of(*rows: Sequence[int], left: int = 100) -> History:
    return History(ids_of(*rows), [left] * len(rows))


def sampler_of(settings: GenerationSettings, tokenizer: Tokenizer = TOKENIZER, size: int = 257, n: int = 1) -> Sampler:
    return Sampler([settings], Vocabulary(tokenizer, size), row_keys(0, n))


def ruled(sampler: Sampler, logits: mx.array, history: History) -> mx.array:
    return sampler.apply_rules(logits, sampler.inputs(history), history)


def chosen(sampler: Sampler, logits: mx.array, history: History) -> mx.array:
    return sampler.choose(logits, sampler.inputs(history), history)


def distribution(given: dict[str, Any], p: Any = None) -> np.ndarray:
    """Return the sampler's distribution of the first five ids."""
    logits = np.full((1, 257), -100, dtype=np.float32)
    logits[0, :5] = np.log(P if p is None else p)
    sampler = sampler_of(GenerationSettings(**{"temperature": 1.0} | given))
    return np.array(mx.softmax(ruled(sampler, mx.array(logits), history_of([7])), axis=-1))[0, :5]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, normal(P**2)),
        ({"temperature": 2.0, "top_k": 5}, normal(P**0.5)),
        ({"top_k": 3}, normal([0, 0.4, 0, 0.3, 0.15])),
        ({"top_p": 0.8}, normal([0, 0.4, 0, 0.3, 0.15])),
        ({"min_p": 0.3}, normal([0, 0.4, 0, 0.3, 0.15])),
        ({"typical_p": 0.4}, normal([0, 0.4, 0, 0.3, 0])),  # surprises 1.2 and 0.9 are nearest to the entropy, 1.39
        ({"logit_bias": {1: -inf, 2: log(2)}}, normal([0.05, 0, 0.2, 0.3, 0.15])),
        # Temperature before top-p: P² has shares .525 .295 .074 .033 .008, of which two reach 0.8; of P three do.
        ({"temperature": 0.5, "top_p": 0.8}, normal([0, 0.16, 0, 0.09, 0])),
        # Top-k before top-p: of the two most probable the first has 0.57 of the rest, which reaches 0.5.
        ({"top_k": 2, "top_p": 0.5}, np.array([0, 1, 0, 0, 0])),
        # Bias before top-k.
        ({"logit_bias": {1: -inf}, "top_k": 2}, normal([0, 0, 0, 0.3, 0.15])),
    ],
    ids=str,
)
def test_the_rules_are_applied_in_order(given: dict[str, Any], expected: np.ndarray) -> None:
    assert distribution(given) == pytest.approx(expected, abs=1e-5)


def test_ids_unknown_to_the_tokenizer_are_never_drawn() -> None:
    padded = mx.zeros((1, 300))
    sampler = sampler_of(GenerationSettings(temperature=1.0), size=300)
    assert kept(ruled(sampler, padded, history_of([0]))) == [set(range(257))]
    holes = Tokenizer(TOKENIZER.ranks, {"<|endoftext|>": 280})  # nothing has the ids from 256 to 279
    sampler = sampler_of(GenerationSettings(temperature=0), holes, 300)
    assert kept(ruled(sampler, padded, history_of([0]))) == [{*range(256), 280}]
    favoured = mx.where(mx.arange(300) == 299, 50.0, 0.0)[None]
    assert chosen(sampler, favoured, history_of([0])).item() < 256


def test_a_banned_word_is_banned_with_a_space_before_it_too() -> None:
    a, b = TOKENIZER.encode("ab")
    sampler = sampler_of(GenerationSettings(ban=("ab", "b")))
    assert kept(ruled(sampler, mx.zeros((1, 257)), history_of([a]))) == [set(range(257)) - {b}]
    space = Tokenizer({**TOKENIZER.ranks, b" b": 257}, TOKENIZER.specials)
    sampler = sampler_of(GenerationSettings(ban=("b",)), space, 258)
    assert kept(ruled(sampler, mx.zeros((1, 258)), history_of([a]))) == [set(range(258)) - {b, 257}]


def test_the_end_is_forbidden_before_min_tokens() -> None:
    sampler, history = sampler_of(GenerationSettings(min_tokens=2)), history_of([5, 6, 7])
    for n in range(3):
        (allowed,) = kept(ruled(sampler, mx.zeros((1, 257)), history))
        assert (END in allowed) == (n == 2)
        history = history.then(ids_of([1]))


def test_the_prompt_counts_as_repeated_but_not_as_generated() -> None:
    logits, history = mx.full((1, 257), 8.0), history_of([5]).then(ids_of([6]))

    def penalized(**given: float) -> set[int]:
        sampler = sampler_of(GenerationSettings(temperature=1.0, **given))  # type: ignore[arg-type]
        return set(np.flatnonzero(np.array(ruled(sampler, logits, history)[0]) < 8).tolist())

    assert penalized(repetition_penalty=2.0) == {5, 6}
    assert penalized(presence_penalty=2.0) == penalized(frequency_penalty=2.0) == {6}


# Contradictions


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"logit_bias": dict.fromkeys(range(257), -inf)}, "--logit-bias"),
        ({"logit_bias": dict.fromkeys(range(256), -inf), "min_tokens": 1}, "--logit-bias and --min-tokens"),
        ({"ban": tuple(TOKENIZER.decode([i]) for i in range(94)), "logit_bias": dict.fromkeys(range(94, 257), -inf)},
         "--logit-bias and --ban"),
    ],
    ids=["bias", "bias and minimum", "bias and bans"],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_forbid_every_id_draw_nothing_and_are_named(
    given: dict[str, Any], names: str, temperature: float
) -> None:
    choice = GenerationSettings(temperature=temperature, top_p=0.9, min_p=0.1, typical_p=0.9, top_k=5, **given)
    sampler = sampler_of(choice)
    assert chosen(sampler, mx.zeros((1, 257)), history_of([0])).item() == NO_TOKEN
    error = no_token_error([choice])
    assert isinstance(error, UsageError)
    assert f"all tokens are masked by {names};" in str(error)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_id_is_drawn_from_logits_that_are_not_numbers(temperature: float) -> None:
    settings = GenerationSettings(temperature=temperature, top_k=5)
    logits = mx.array(np.full((1, 257), np.nan, np.float32))
    assert chosen(sampler_of(settings), logits, history_of([0])).item() == NO_TOKEN
    assert "not numbers" in str(no_token_error([settings]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"force": ("blue",), "ban": ("lu",)}, "--force 'blue' contradicts --ban or --logit-bias"),
        ({"force": ("blue",), "logit_bias": {TOKENIZER.encode("u")[0]: -inf}}, "--force 'blue' contradicts --ban"),
        ({"force": ("blue", "red"), "max_tokens": 8}, "words of 9 tokens, --max-tokens allows 8"),
        ({"logit_bias": {257: 1.0}}, "--logit-bias: no token has id 257; the vocabulary's ids are 0 to 256"),
        ({"logit_bias": {-1: 1.0}}, "no token has id -1"),
    ],
    ids=str,
)
def test_settings_that_contradict_the_vocabulary_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler_of(GenerationSettings(**given), size=300)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or above, not -1.0"),
        ({"temperature": nan}, "temperature must be"),
        ({"temperature": inf}, "temperature must be"),
        ({"top_k": -1}, r"top-k must be 0 \(off\) or a number of ids, not -1"),
        ({"top_p": 0.0}, r"top-p must be above 0 and at most 1 \(off\), not 0.0"),
        ({"top_p": 2.0}, "top-p must be above 0"),
        ({"top_p": nan}, "top-p must be above 0"),
        ({"min_p": -0.1}, r"min-p must be at least 0 \(off\) and at most 1, not -0.1"),
        ({"min_p": 1.1}, "min-p must be"),
        ({"typical_p": 0.0}, "typical-p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be above 0; 1 is off, not 0.0"),
        ({"frequency_penalty": inf}, "frequency-penalty must be a number"),
        ({"presence_penalty": nan}, "presence-penalty must be a number"),
        ({"no_repeat_ngram": -2}, "no-repeat-ngram must be 0"),
        ({"max_tokens": -1}, "max-tokens must be 0 or above, not -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min-tokens 5 is more than max-tokens 4"),
        ({"seed": -1}, "seed must be 0 or above"),
        ({"stop": ("a", "")}, "stop must be texts of at least one character"),
        ({"stop": "abc"}, "stop must be texts"),  # not the three stops a, b and c
        ({"ban": ("",)}, "ban must be texts"),
        ({"logit_bias": {3: nan}}, "logit-bias of id 3 must be a number or -inf"),
        ({"logit_bias": {3: inf}}, "logit-bias of id 3 must be"),
        ({"context": "roll"}, "context must be stop or slide, not 'roll'"),
        ({"cache_bits": 5}, "cache-bits must be 16"),
        ({"logprobs": -1}, "logprobs must be 0 or above"),
    ],
    ids=str,
)
def test_an_invalid_setting_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerationSettings(**given)


# Drawing

LIMIT = 23.5  # chi-square with 4 degrees of freedom is larger once in ten thousand


def chi_square(counts: np.ndarray, p: Any) -> float:
    expected = counts.sum() * np.asarray(p)
    return float(((counts - expected) ** 2 / expected).sum())


def counted(ids: mx.array) -> np.ndarray:
    return np.bincount(np.array(ids), minlength=5)


@pytest.mark.parametrize("source", ["rows", "places", "seeds"])
def test_ten_thousand_draws_follow_the_distribution(source: str) -> None:
    n = 10_000
    keys = {
        "rows": lambda: key_at(row_keys(0, n), 3),
        "places": lambda: mx.concatenate([key_at(row_keys(0, 1), place) for place in range(n)]),
        "seeds": lambda: mx.concatenate([row_keys(seed, 1) for seed in range(n)]),
    }[source]()
    drawn = sampling.draw(mx.broadcast_to(logits_of(P), (n, 5)), keys)
    assert chi_square(counted(drawn), P) < LIMIT
    assert chi_square(counted(drawn), normal(P + 0.02)) > LIMIT  # and the test can tell
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (np.array(drawn[:-1]), np.array(drawn[1:])), 1)
    assert chi_square(pairs.ravel(), np.outer(P, P).ravel()) < 62  # 24 degrees of freedom: neighbours are strangers


def test_forbidden_ids_are_never_drawn() -> None:
    logits = np.full((10_000, 257), -100, dtype=np.float32)
    logits[:, :5] = np.log(P)
    sampler = sampler_of(GenerationSettings(temperature=1.0, top_k=3, logit_bias={1: -inf}), n=10_000)
    history = History(mx.zeros((10_000, 1), mx.int32), [9] * 10_000)
    counts = counted(chosen(sampler, mx.array(logits), history))
    assert set(np.flatnonzero(counts)) == {2, 3, 4}
    assert chi_square(counts[2:5], normal(P[2:5])) < LIMIT


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = mx.random.normal((6, 50), key=mx.random.key(0))
    keys = row_keys(7, 6)
    together = sampling.draw(logits, keys).tolist()
    assert [sampling.draw(logits[i : i + 1], keys[i : i + 1]).item() for i in range(6)] == together
    assert row_keys(7, 3).tolist() == keys[:3].tolist()
    assert row_keys(8, 6).tolist() != keys.tolist()


def test_without_a_seed_keys_come_from_mlx() -> None:
    mx.random.seed(3)
    first, second = row_keys(None, 1).tolist(), row_keys(None, 1).tolist()
    mx.random.seed(3)
    assert row_keys(None, 1).tolist() == first != second


def test_temperature_0_takes_the_most_probable_and_draws_nothing() -> None:
    before = mx.array(mx.random.state[0])
    sampler = sampler_of(GenerationSettings(temperature=0, top_k=5), n=3)
    logits = mx.random.normal((3, 257), key=mx.random.key(1))
    assert chosen(sampler, logits, history_of([0], [0], [0])).tolist() == mx.argmax(logits, axis=-1).tolist()
    assert mx.array_equal(mx.random.state[0], before)


# From here on with torch and transformers

A, B, C = TOKENIZER.encode("abc")
RULES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # our settings and theirs
    ({"temperature": 0.6}, {"temperature": 0.6}),
    ({"temperature": 1.9}, {"temperature": 1.9}),
    ({"top_k": 7}, {"top_k": 7}),
    ({"top_p": 0.6}, {"top_p": 0.6}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"typical_p": 0.7}, {"typical_p": 0.7}),
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}),
    (
        {"logit_bias": {A: 5.0, B: -3.0, C: -inf}},
        {"sequence_bias": {(A,): 5.0, (B,): -3.0, (C,): -inf}},
    ),
    ({"ban": ("ab", "c")}, {"bad_words_ids": [TOKENIZER.encode(word) for word in ("ab", " ab", "c", " c")]}),
    ({"min_tokens": 4}, {"min_new_tokens": 4}),
]
TOGETHER = [(0, 2, 3), (0, 3, 4), (1, 2, 5), (1, 2, 3, 4, 5), (6, 9, 0, 3), (11, 6, 12, 13, 1, 4)]
COMBINATIONS: list[tuple[int, ...]] = [*((i,) for i in range(len(RULES))), *TOGETHER]


@pytest.mark.parity
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda c: " ".join(key for i in c for key in RULES[i][0]))
def test_the_probabilities_are_those_of_transformers(chosen: tuple[int, ...]) -> None:
    """Step by step along a text that transformers drew: its raw logits through our rules, against what it drew from."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = {key: value for i in chosen for key, value in RULES[i][0].items()}
    theirs = {key: value for i in chosen for key, value in RULES[i][1].items()}
    torch.manual_seed(0)
    model = tiny_gpt2(vocab_size=257, bos_token_id=END, eos_token_id=END)
    prompt = [A, B, C, A, B]
    neutral = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": END}  # their default is top_k 50
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=12,
        num_return_sequences=4,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **(neutral | theirs),
    )
    drawn = out.sequences[:, len(prompt) :].numpy().astype(np.int32)
    sampler = sampler_of(GenerationSettings(**{"temperature": 1.0} | ours), n=4)
    history, alive, changed = history_of(*[prompt] * 4), np.ones(4, dtype=bool), False
    for n, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        found = np.array(mx.softmax(ruled(sampler, mx.array(logits.numpy()), history), axis=-1))
        expected = scores.double().softmax(-1).numpy()
        assert np.abs(found - expected)[alive].max() < 1e-6, f"token {n}"
        changed |= np.abs(expected - logits.double().softmax(-1).numpy()).max() > 1e-4
        history = history.then(mx.array(drawn[:, n : n + 1]))
        alive &= drawn[:, n] != END
    assert changed  # or the rule was never put to the test
