"""Prefetched batches equal ``endless_batches`` from any position on, and each process has its rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from mlx_gpt.errors import DataError
from mlx_gpt.text import batches as module
from mlx_gpt.text.batches import AHEAD, Batches
from mlx_gpt.text.windows import TokenStream, endless_batches

T, B = 8, 3
STREAM = TokenStream(np.arange(401, dtype=np.uint16), np.array([0, 40, 41, 200, 400]))


@pytest.fixture(autouse=True)
def no_thread_remains() -> Iterator[None]:
    yield
    patience = time.monotonic() + 5
    while any(thread.name == "batches" for thread in threading.enumerate()) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def taken(batches: Batches, n: int) -> np.ndarray:
    """Take the next n batches, (n, 2, B, T), and close."""
    found = np.array(list(islice(batches, n)))
    batches.close()
    return found


def expected(n: int, batch_size: int = B, skip: int = 0) -> np.ndarray:
    return np.array(list(islice(endless_batches(STREAM, T, batch_size, 7, skip), n)))


def test_they_equal_endless_batches_over_several_epochs() -> None:
    found = taken(Batches(STREAM, T, B, 7), 60)  # an epoch has 51 or so windows, 17 batches
    assert (found == expected(60)).all()
    assert found.dtype == np.int32


@pytest.mark.parametrize("position", [1, 16, 17, 40])
def test_they_continue_from_a_position(position: int) -> None:
    first = Batches(STREAM, T, B, 7)
    taken(first, position)
    assert first.position == position  # however many are prefetched
    assert (taken(Batches(STREAM, T, B, 7, position), 20) == expected(60)[position : position + 20]).all()


def test_the_rows_of_all_processes_are_the_whole_batch() -> None:
    parts = [taken(Batches(STREAM, T, B, 7, rank=rank, size=2), 20) for rank in range(2)]
    assert (np.concatenate(parts, axis=2) == expected(20, batch_size=2 * B)).all()


def test_a_limited_number_is_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in endless_batches(*arguments, **options):
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(module, "endless_batches", watched)
    batches = Batches(STREAM, T, B, 7)
    next(batches)
    patience = time.monotonic() + 5
    while len(drawn) < 1 + AHEAD + 1 and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(drawn) == 1 + AHEAD + 1  # one taken, four queued, one waiting
    batches.close()


def test_an_error_in_the_thread_is_raised_by_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Iterator[Any]:
        yield from expected(1)
        raise OSError("the disk is gone")

    monkeypatch.setattr(module, "endless_batches", failing)
    batches = Batches(STREAM, T, B, 7)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_text_shorter_than_a_window_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="shorter than one window"):
        Batches(STREAM, 401, B, 7)
