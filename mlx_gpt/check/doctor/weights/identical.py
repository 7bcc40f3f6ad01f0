"""Heads that are equal to each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.parameters import Arrays, current, is_matrix, layers_of
from mlx_gpt.check.doctor.weights.heads import HEADS, thirds_of


@check("identical-heads", "parameters")
def identical_heads(case: Case) -> Found:
    """All heads of a layer have the same weights, as after one head's initial weights were given to all.

    At least two matrices of a layer, such as queries and keys, consist of 2 to 32 equal parts, one for each head; or,
    where each head has its own matrix, these are equal. Equal is a distance from the first head's part below 0.05 of
    its norm; in healthy layers, initialised or trained, the distance is 1.2 and more.
    """
    copies: dict[str, int] = {}
    for label, names in layers_of(list(case.once(current))).items():
        layer = {name: case.once(current)[name] for name in names if is_matrix(case.once(current)[name])}
        counts = [next((len(heads) for heads in stacks if heads_are_equal(heads)), 0) for stacks in head_stacks(layer)]
        if sum(count > 0 for count in counts) >= 2:
            copies[label] = max(counts)
    if not copies:
        return None
    return {
        "measured": list(copies),
        "expected": "different weights for each head",
        "why": f"in {', '.join(copies)} all heads have the same weights, so that they compute the same",
        "remedy": "draw the initial weights of all heads at once, never one head's repeated or broadcast",
        "evidence": {"heads": copies},
    }


def head_stacks(layer: Arrays) -> Iterator[Iterator[np.ndarray]]:
    """Yield for each matrix of a layer, or third of one, its possible divisions into heads: arrays (H, ...)."""
    own: dict[str, list[np.ndarray]] = {}
    for name, array in layer.items():
        own.setdefault(re.sub(r"(\d\D+)\d+", r"\1*", name, count=1), []).append(array)
    for arrays in own.values():
        if len(arrays) > 1 and len({array.shape for array in arrays}) == 1:
            yield iter([np.stack(arrays)])
    for array in layer.values():
        if array.ndim == 3:
            yield iter([array])
        else:
            for part in thirds_of(array):
                yield divisions(array[part])


def divisions(matrix: np.ndarray) -> Iterator[np.ndarray]:
    for rows, H in product((matrix, matrix.T), HEADS):
        if len(rows) % H == 0:
            yield rows.reshape(H, len(rows) // H, -1)


def heads_are_equal(heads: np.ndarray) -> bool:
    first = float(np.linalg.norm(heads[0].astype(np.float32)))
    return first > 0 and all(float(np.linalg.norm(head - heads[0])) < 0.05 * first for head in heads[1:])
