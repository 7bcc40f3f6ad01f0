"""The user's parameters: by layer, replaced by random ones for a while, and the gradient of the loss by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.probes import LENGTH, first_call, own_text_or_random, silent_if_random

Arrays = dict[str, np.ndarray]


def current(case: Case) -> Arrays:
    """Return the user's parameters."""
    return case.arrays("parameters")


def is_matrix(array: np.ndarray) -> bool:
    """True for a float array with two or three axes; masks of four axes are none."""
    return array.dtype.kind == "f" and array.ndim in (2, 3) and array.size > 1


def is_table(name: str, array: np.ndarray, case: Case) -> bool:
    return not re.search(r"\d", name) and array.ndim == 2 and bool({case.vocab_size, case.n_positions} & {*array.shape})


def is_mask(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.shape[0] == array.shape[1] and len(np.unique(array.ravel()[:4096])) == 2


def generic(case: Case) -> Arrays:
    """Return parameters of the same shapes without any special value: no zero, no two equal.

    A part that has no effect with these has none with any: a projection that is zero at first, or a gate, hides
    nothing. Matrices are drawn from N(0, 1/width), to vectors and scalars N(0, 0.1²) is added.
    """
    return {name: drawn(case, array) for name, array in case.once(current).items()}


def alone(case: Case, names: list[str], layers: list[tuple[str, list[str]]]) -> Arrays:
    """Return generic parameters in which the matrices of all other layers are zero."""
    mine = set(names)
    muted = {name for _, members in layers for name in members if name not in mine}
    return {name: np.zeros_like(array) if name in muted else array for name, array in case.once(generic).items()}


def matrices_by_layer(case: Case) -> dict[str, list[str]]:
    return layers_of([name for name, array in case.once(generic).items() if is_matrix(array)])


def drawn(case: Case, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" or array.ndim > 3 or is_mask(array):
        return array
    noise = case.rng.standard_normal(array.shape, np.float32)
    drawn = noise / np.sqrt(min(array.shape[-2:])) if is_matrix(array) else array + 0.1 * noise
    return drawn.astype(array.dtype)


@contextmanager
def loaded(case: Case, values: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Give the model other parameters for a while."""
    with case.parameters_restored():
        case.load({name: array.copy() for name, array in values.items()})
        yield


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters' names by layer: those that begin alike up to the first number, as ``blocks.0``.

    Where each number occurs once with each beginning, as in ``wq1 wk1 wq2``, the number alone is the layer.
    """
    families: dict[str, dict[str, list[str]]] = {}
    for name in names:
        found = re.match(r"(.*?(?:^|[._/]))(\d+)(?=[._/]|$)", name) or re.match(r"(.*?)(\d+)", name)
        if found:
            families.setdefault(found[1], {}).setdefault(found[2], []).append(name)
    if not families:
        return {}
    prefix, largest = max(families.items(), key=lambda item: sum(map(len, item[1].values())))
    if any(len(members) > 1 for members in largest.values()):
        return {prefix + index: members for index, members in largest.items()}
    merged: dict[str, list[str]] = {}
    for family in families.values():
        for index, members in family.items():
            merged.setdefault(index, []).extend(members)
    return merged


def gradient(case: Case, rows: int, length: int) -> Arrays:
    """Return the gradient of the mean loss of a text of ``length`` + 1 tokens, with the parameters as they are."""
    case.once(first_call)
    ids = own_text_or_random(case, 1 if case.one_row else rows, min(length, case.n_positions) + 1)
    return case.arrays("gradient", ids[:, :-1].copy(), ids[:, 1:].copy())


def require_steady(case: Case) -> None:
    """Raise ``NotApplicable`` unless the logits of a text are finite and the same at each call."""
    silent_if_random(case)
    if not np.isfinite(case.once(first_call)).all():
        raise NotApplicable("finite logits")


def generic_ids(case: Case) -> np.ndarray:
    """Return a random text for a model with generic parameters: (1, T)."""
    if case.vocab_size < 2 or case.n_positions < 2:
        raise NotApplicable("vocab_size and n_positions of at least 2")
    return case.ids(1, min(LENGTH, case.n_positions))  # more than twice the heads
