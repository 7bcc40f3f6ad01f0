"""The head: the embedding's own table where it is meant to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import check
from mlx_gpt.check.doctor.forward.probes import EQUAL, silent_if_random
from mlx_gpt.check.doctor.modules import CONFIGS
from mlx_gpt.check.doctor.weights.evidence import current, generic_ids, loaded, text
from mlx_gpt.check.doctor.weights.inside import module_of
from mlx_gpt.check.doctor.weights.saved import ROUNDING, reloaded

Found = dict[str, Any] | None
FLAGS = ("tie_word_embeddings", "tie_weights", "tie_embeddings", "tied_embeddings", "weight_tying", "tied", "tie")
ALIKE = 0.5
LOGITS = 2**26  # numbers in the logits of a text


@check("head-not-tied", "forward", "parameters", "load_parameters", explains=("reload-differs",))
def head_not_tied(case: Case) -> Found:
    """Head and embedding are meant to share one table, but are two: copies that part at the first step.

    Meant to: the configuration says so, or the tables are equal, or they have a cosine above 0.5, so that they were
    equal once (trained apart from the beginning: below ...). The head is the table whose row v changes the logits of
    token v alone. Equal tables are no fault if one step of the user's leaves them equal, or if one changes with the
    other. Of a model whose head is its embedding also the reloaded one: its logits are a linear map of the same hidden
    states, but by another table. Two tables in a model that is not meant to share them are no fault.
    """
    silent_if_random(case)
    ids = generic_ids(case)
    heads = {name: axis for name, axis in tables(case) if is_head(case, ids, name, axis)}
    found = [separate(case, *pair) for pair in pairs(case, heads)]
    return next((one for one in found if one), None) or reloaded_apart(case, heads)


def tables(case: Case) -> Iterator[tuple[str, int]]:
    """Yield matrices with an axis as long as the vocabulary, and that axis."""
    for name, array in case.once(current).items():
        if array.dtype.kind == "f" and array.ndim == 2:
            yield from ((name, axis) for axis in (0, 1) if array.shape[axis] == case.vocab_size)


def rows(case: Case, name: str, axis: int) -> np.ndarray:
    """Return a table as (V, C)."""
    return np.moveaxis(case.once(current)[name], axis, 0)


def is_head(case: Case, ids: np.ndarray, name: str, axis: int) -> bool:
    """True if a table's row for a token that is not read changes the logits of that token and no other."""
    unread = case.vocab_size - 1
    ids = np.minimum(ids, unread - 1)
    values = {key: array.copy() for key, array in case.once(current).items()}
    np.moveaxis(values[name], axis, 0)[unread] += 1
    before = case.logits(ids)
    with loaded(case, values):
        moved = np.abs(case.logits(ids) - before).max(axis=(0, 1)) > EQUAL * before.std()
    return bool(moved[unread]) and not moved[:unread].any()
