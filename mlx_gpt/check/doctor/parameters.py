"""The user's parameters: by layer, replaced by random ones for a while, and the gradient of the loss by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.probes import EQUAL, LENGTH, effect, first_call, own_text_or_random, silent_if_random

Arrays = dict[str, np.ndarray]


def current(case: Case) -> Arrays:
    """Return the user's parameters."""
    return case.arrays("parameters")


def is_matrix(array: np.ndarray) -> bool:
    """Return True for a float array with two or three axes; masks often have four."""
    return array.dtype.kind == "f" and array.ndim in (2, 3) and array.size > 1


def is_table(name: str, array: np.ndarray, case: Case) -> bool:
    return not re.search(r"\d", name) and array.ndim == 2 and bool({case.vocab_size, case.n_positions} & {*array.shape})


def is_mask(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.shape[0] == array.shape[1] and len(np.unique(array.ravel()[:4096])) == 2


def generic(case: Case) -> Arrays:
    """Return random parameters of the same shapes, of which no value is zero and no two are equal.

    A part without an effect in a model with these has none for any values: no projection or gate that is initialised
    to zero hides it. Matrices are drawn from N(0, 1/width); to vectors and scalars N(0, 0.1²) is added.
    """
    return {name: drawn(case, array) for name, array in case.once(current).items()}


def alone(case: Case, names: list[str], layers: list[tuple[str, list[str]]]) -> Arrays:
    """Return generic parameters in which only one layer, of matrices ``names``, has matrices that are not zero."""
    muted = {name for _, members in layers for name in members} - {*names}
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
    """Load other parameters into the model, and put the user's own back at the end."""
    with case.parameters_restored():
        case.load({name: array.copy() for name, array in values.items()})
        yield


def effect_at_last(case: Case, before: np.ndarray, after: np.ndarray) -> float:
    """Return how far the last logits of two sets of texts differ, the most of all rows; see ``probes.effect``.

    If not at all, then with generic parameters, where they can be loaded: weights that are zero at first, or saturate
    the softmax after training, are no fault of the forward pass.
    """
    size = float(effect(case, before, after)[:, -1].max())
    if size > EQUAL or not case.has("parameters", "load_parameters"):
        return size
    with loaded(case, case.once(generic)):
        return float(effect(case, before, after)[:, -1].max())


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of parameters by layer: those with the same beginning up to the first number, as ``blocks.0``.

    Where each such beginning has one parameter, as in ``wq1 wk1 wq2 wk2``, the number alone names the layer.
    """
    families: dict[str, dict[str, list[str]]] = {}
    for name in names:
        numbered = re.match(r"(.*?(?:^|[._/]))(\d+)(?=[._/]|$)", name) or re.match(r"(.*?)(\d+)", name)
        if numbered:
            families.setdefault(numbered[1], {}).setdefault(numbered[2], []).append(name)
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
    """Return the gradient of the mean loss on ``rows`` texts of ``length`` inputs, at the parameters now loaded."""
    case.once(first_call)
    ids = own_text_or_random(case, 1 if case.one_row else rows, min(length, case.n_positions) + 1)
    return case.arrays("gradient", ids[:, :-1].copy(), ids[:, 1:].copy())


def require_steady(case: Case) -> None:
    """Raise ``NotApplicable`` unless the logits of a text are finite and repeat at each call."""
    silent_if_random(case)
    if not np.isfinite(case.once(first_call)).all():
        raise NotApplicable("finite logits")


def generic_ids(case: Case) -> np.ndarray:
    """Return a random text for a model with generic parameters: (1, T)."""
    if case.vocab_size < 2 or case.n_positions < 2:
        raise NotApplicable("vocab_size and n_positions of at least 2")
    return case.ids(1, min(LENGTH, case.n_positions))  # more than twice the heads
