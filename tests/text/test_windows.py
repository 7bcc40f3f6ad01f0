"""Windows: each target is counted once, they start at documents, and a seed fixes the order of batches."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gpt.errors import DataError
from mlx_gpt.text import windows as windows_module
from mlx_gpt.text.dataset import unigram_and_bigram_entropy
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.windows import TokenStream, Windows, endless_batches

EOT = 99


def stream_of(*lengths: int) -> TokenStream:
    """Documents of these lengths; every id but EOT is 1000 plus its position."""
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    ids = np.arange(1000, 1000 + starts[-1] + 1, dtype=np.int32)
    ids[starts] = EOT
    return TokenStream(ids, starts)


texts = st.lists(st.integers(0, 30), min_size=1, max_size=12)  # lengths of documents, empty ones too


@st.composite
def texts_and_windows(draw: st.DrawFn) -> tuple[TokenStream, int]:
    """A text and a T that is not longer than it."""
    stream = stream_of(*draw(texts))
    return stream, draw(st.integers(1, min(20, stream.n_tokens)))


# Streams


def test_eot_is_before_every_document_and_after_the_last() -> None:
    tokenizer = Tokenizer.bytes()
    stream = TokenStream.from_documents(["ab", "", "c"], tokenizer)
    a, b, c, eot = *tokenizer.encode("abc"), tokenizer.eot_id
    assert stream.ids.tolist() == [eot, a, b, eot, eot, c, eot]
    assert stream.ids.dtype == np.int32
    assert stream.starts.tolist() == [0, 3, 4, 6]
    assert stream.n_tokens == 6  # the first is given, not predicted


def test_eot_in_a_text_is_plain_text() -> None:
    tokenizer = Tokenizer.bytes()
    stream = TokenStream.from_documents(["a<|endoftext|>b"], tokenizer)
    assert (stream.ids == tokenizer.eot_id).sum() == 2


def test_documents_encoded_in_parts_give_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["ab", "", "c", "de", "f"]
    whole = TokenStream.from_documents(documents, Tokenizer.bytes())
    monkeypatch.setattr(windows_module, "ENCODED_AT_ONCE", 2)
    parts = TokenStream.from_documents(documents, Tokenizer.bytes())
    assert (parts.ids == whole.ids).all()
    assert (parts.starts == whole.starts).all()


# Windows


@given(texts_and_windows())
@settings(max_examples=300, deadline=None)
def test_every_token_is_counted_as_a_target_exactly_once(case: tuple[TokenStream, int]) -> None:
    stream, T = case
    windows = Windows.over(stream, T)
    x, y, counts = windows.batch(np.arange(len(windows)))
    assert x.shape == y.shape == counts.shape == (len(windows), T)
    positions = windows.starts[:, None] + 1 + np.arange(T)
    assert sorted(positions[counts]) == list(range(1, len(stream.ids)))
    assert Counter(y[counts].tolist()) == Counter(stream.ids[1:].tolist())


@given(texts_and_windows())
@settings(max_examples=300, deadline=None)
def test_targets_are_the_inputs_shifted_by_one(case: tuple[TokenStream, int]) -> None:
    stream, T = case
    windows = Windows.over(stream, T)
    x, y, counts = windows.batch(np.arange(len(windows)))
    assert (y[:, :-1] == x[:, 1:]).all()
    assert (x[:, 0] == stream.ids[windows.starts]).all()
    assert (y[counts] == stream.ids[(windows.starts[:, None] + 1 + np.arange(T))[counts]]).all()


@given(texts_and_windows())
@settings(max_examples=300, deadline=None)
def test_a_window_starts_at_a_document_or_inside_a_long_one(case: tuple[TokenStream, int]) -> None:
    stream, T = case
    windows = Windows.over(stream, T)
    for i, start in enumerate(windows.starts):
        if start not in stream.starts:  # inside a document: the window before is full and lies in it
            assert windows.counted[i - 1] == T
            assert not set(range(start - T + 1, start + 1)) & set(stream.starts.tolist())


def test_documents_that_fit_share_a_window_and_the_next_starts_with_a_whole_one() -> None:
    windows = Windows.over(stream_of(3, 3, 3), T=10)  # EOT at 0, 4, 8 and 12
    assert windows.starts.tolist() == [0, 8]
    assert windows.counted.tolist() == [8, 4]
    x, y, counts = windows.batch(np.array([0, 1]))
    assert x[0].tolist() == [EOT, 1001, 1002, 1003, EOT, 1005, 1006, 1007, EOT, 1009]
    assert y[0, :8].tolist() == [1001, 1002, 1003, EOT, 1005, 1006, 1007, EOT]
    assert y[1].tolist() == [1009, 1010, 1011, EOT, *[EOT] * 6]  # past the end: repeated, not counted
    assert counts.sum(axis=1).tolist() == [8, 4]


def test_documents_that_fill_a_window_exactly_are_not_split() -> None:
    assert Windows.over(stream_of(2, 2, 2, 2), T=6).starts.tolist() == [0, 6]


def test_a_long_document_is_split_and_the_next_starts_a_window() -> None:
    windows = Windows.over(stream_of(25, 7), T=10)  # EOT at 0, 26 and 34
    assert windows.starts.tolist() == [0, 10, 20, 26]
    assert windows.counted.tolist() == [10, 10, 6, 8]


def test_a_text_shorter_than_one_window_is_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"6 tokens, and a window \(n_positions\) is 7; give more text or a smaller"):
        Windows.over(stream_of(5), T=7)
    assert len(Windows.over(stream_of(5), T=6)) == 1
    with pytest.raises(DataError, match="shorter than one window"):
        next(endless_batches(stream_of(5), 7, 2, seed=0))


# Batches


def rows_of(stream: TokenStream, T: int, n: int, seed: int = 0) -> list[list[int]]:
    """The first n rows of T + 1 ids."""
    return [[*x[0], y[0, -1]] for x, y in islice(endless_batches(stream, T, 1, seed), n)]


@given(texts_and_windows())
@settings(max_examples=200, deadline=None)
def test_batches_are_pieces_of_the_text(case: tuple[TokenStream, int]) -> None:
    stream, T = case
    text = stream.ids.tolist()
    for x, y in islice(endless_batches(stream, T, 3, seed=1), 5):
        assert x.shape == y.shape == (3, T)
        assert (y[:, :-1] == x[:, 1:]).all()
        for row in np.concatenate([x, y[:, -1:]], axis=1).tolist():
            assert any(row == text[i : i + T + 1] for i in range(len(text) - T))


def test_an_epoch_has_every_window_once() -> None:
    stream, T = stream_of(*[9] * 51), 20  # two documents of ten ids fill a window, and the last one half of it
    starts = Windows.over(stream, T).starts
    seen = [row[0] if row[0] != EOT else row[1] - 1 for row in rows_of(stream, T, len(starts))]
    # A row starts at its window's EOT or one id later, which identifies the window. The last one is moved back.
    assert sorted((first - 1000) // 10 * 10 for first in seen) == [*starts[:-1], len(stream.ids) - (T + 1)]
    assert seen != sorted(seen)


def test_half_of_the_rows_start_without_eot() -> None:
    first = [row[0] == EOT for row in rows_of(stream_of(*[9] * 400), 10, 400)]
    assert 0.4 < np.mean(first) < 0.6


def test_every_epoch_splits_a_long_document_elsewhere_and_has_another_order() -> None:
    stream, T = stream_of(2000), 10
    n = len(Windows.over(stream, T))
    rows = rows_of(stream, T, 2 * n)
    first, second = ({row[-1] % T for row in epoch} for epoch in (rows[:n], rows[n : 2 * n - 2]))
    assert len(first) <= 3  # ends of windows: equal up to the omitted EOT, and the last one
    assert first != second
    assert np.argsort([row[-1] for row in rows[:n]]).tolist() != np.argsort([row[-1] for row in rows[n:]]).tolist()


@pytest.mark.parametrize("T", [5, 8, 13])
def test_every_target_is_trained_on(T: int) -> None:
    stream = stream_of(7, 30, 2, 18, 11)
    seen = {one for row in rows_of(stream, T, 200) for one in row[1:]}
    assert seen >= set(stream.ids[2:].tolist())  # the very first only if EOT is not omitted


def test_the_seed_fixes_the_order_of_batches() -> None:
    stream = stream_of(*[9] * 50)
    assert rows_of(stream, 12, 150, seed=3) == rows_of(stream, 12, 150, seed=3)
    assert rows_of(stream, 12, 150, seed=3) != rows_of(stream, 12, 150, seed=4)


# Entropies


def entropies_of(ids: list[int], vocab_size: int = 100) -> tuple[float, float]:
    return unigram_and_bigram_entropy(
        TokenStream(np.array([EOT, *ids, EOT], np.int32), np.array([0, len(ids) + 1])), vocab_size
    )


def test_an_alternating_text_has_unigram_entropy_ln_2_and_bigram_entropy_0() -> None:
    ids = [EOT, 7] * 50  # EOT is one of the two tokens
    stream = TokenStream(np.array([*ids, EOT], np.int32), np.array([0]))
    assert unigram_and_bigram_entropy(stream, 100) == (pytest.approx(log(2)), pytest.approx(0, abs=1e-12))


def test_a_text_with_every_pair_once_has_both_entropies_ln_v() -> None:
    V = 7
    walk, left = [0], {(a, b) for a in range(V) for b in range(V)}
    while after := [b for b in range(V) if (walk[-1], b) in left]:
        left.remove((walk[-1], after[-1]))
        walk.append(after[-1])
    assert not left  # a de Bruijn sequence
    stream = TokenStream(np.array(walk, np.int32), np.array([0]))
    assert unigram_and_bigram_entropy(stream, V) == (pytest.approx(log(V)), pytest.approx(log(V)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
@settings(deadline=None)
def test_entropies_equal_those_of_explicit_counts(ids: list[int]) -> None:
    row = [EOT, *ids, EOT]
    after = Counter(row[1:])
    unigram = -sum(n / len(row[1:]) * log(n / len(row[1:])) for n in after.values())
    pairs, before = Counter(pairwise(row)), Counter(row[:-1])
    bigram = -sum(n / len(row[1:]) * log(n / before[first]) for (first, _), n in pairs.items())
    found = entropies_of(ids)
    assert found == (pytest.approx(unigram), pytest.approx(bigram))
    assert -1e-9 <= found[1] <= found[0] + 1e-9 <= log(7) + 1e-6


def test_pairs_of_high_ids_do_not_collide() -> None:
    V = 2**17  # in 32 bits the pairs (2^15, 0) and (0, 0) would have the same number
    assert entropies_of([0, 0, 2**15, 0, 0, 2**15], V) == pytest.approx(entropies_of([1, 1, 2, 1, 1, 2]))
