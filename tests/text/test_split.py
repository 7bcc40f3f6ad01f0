"""The split into training and validation: whole files or records at random, else the end of every file."""

from __future__ import annotations

import pytest

from mlx_gpt.errors import UsageError
from mlx_gpt.text.sources import find_sources
from mlx_gpt.text.split import is_val_record, split_files


def sizes_of(*sizes: int) -> dict[int, int]:
    return dict(enumerate(sizes))


def test_many_files_are_split_whole_and_at_random() -> None:
    sizes = sizes_of(*(8 * (1 + i % 7) for i in range(500)))
    split = split_files(sizes, 0.1, seed=0)
    assert set(split.values()) == {0}
    assert sum(sizes[i] for i in split) / sum(sizes.values()) == pytest.approx(0.1, abs=0.005)
    assert min(split) < 100 < 400 < max(split), "from everywhere, not from one end"


def test_the_split_is_fixed_by_the_seed() -> None:
    sizes = sizes_of(*range(50, 250))
    assert split_files(sizes, 0.1, 0) == split_files(sizes, 0.1, 0) != split_files(sizes, 0.1, 1)
    records = [[is_val_record(3, i, 0.1, seed) for i in range(2000)] for seed in (0, 0, 1)]
    assert records[0] == records[1] != records[2]
    assert sum(records[0]) / 2000 == pytest.approx(0.1, abs=0.03)
    assert records[0] != [is_val_record(4, i, 0.1, 0) for i in range(2000)]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_few_files_each_give_their_end(n: int) -> None:
    split = split_files(sizes_of(*[1000] * n), 0.2, seed=0)
    if n < 5:  # less than a whole file for validation
        assert split == dict.fromkeys(range(n), 800)
    else:
        assert list(split.values()) == [0]


def test_small_files_beside_a_large_one_are_not_the_whole_validation_text() -> None:
    split = split_files(sizes_of(700_000, *[5] * 30), 0.1, seed=0)
    assert split[0] == 630_000


def test_no_files_have_no_split() -> None:
    assert split_files({}, 0.1, seed=0) == {}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10, float("nan")])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="the validation fraction must be between 0 and 1, not"):
        find_sources([], fraction)
