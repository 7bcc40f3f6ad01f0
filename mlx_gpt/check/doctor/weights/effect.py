"""Parts of the model without an effect: a layer that is not called, or whose output is dropped."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.parameters import (
    Arrays,
    current,
    drawn,
    generic,
    generic_ids,
    gradient,
    is_matrix,
    is_table,
    layers_of,
    loaded,
    require_steady,
)
from mlx_gpt.check.doctor.probes import EQUAL
from mlx_gpt.check.doctor.weights.units import hidden_widths

SHARE = 0.1  # of the time that is left, in which parts are tried


@check(
    "layer-without-effect",
    "parameters",
    "load_parameters",
    explains=("past-ignored", "context-too-short", "dead-units", "reported-loss-differs"),
)
def layer_without_effect(case: Case) -> dict[str, Any] | None:
    """A layer, or a part of one, has no effect: it is not called, or its output is dropped or multiplied by zero.

    All parameters are first replaced by random ones, so that no projection or gate that is initialised to zero hides
    a part. Then, for each part without a gradient, all of its parameters are drawn again. A fault if no logit moves by
    more than 1e-6 of the standard deviation (without effect: exactly 0; healthy parts: 1e-3 and more). Also a fault are
    matrices of zeros whose gradient is exactly zero, since training cannot move them; a zero matrix with a gradient is
    sound. Biases are near zero meanwhile: a layer whose units are all inactive by their bias is ``dead-units``.
    """
    require_steady(case)
    dropped = without_effect(case)
    stuck = [] if dropped else stuck_at_zero(case)
    if not dropped and not stuck:
        return None
    parts = dropped or stuck
    shown = ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
    why = f"new values for all parameters of {shown} change no logit"
    return {
        "measured": parts,
        "expected": "an effect of every part",
        "why": why
        if dropped
        else f"{shown}: all zero, with a gradient of exactly zero, so that training cannot move it",
        "remedy": "check that the part is called, and that its output is added: x = x + part(norm(x))"
        if dropped
        else "initialise at most one matrix of each residual branch with zeros",
        "evidence": {"parts": parts},
    }


def parts_of(parameters: Arrays, case: Case) -> dict[str, list[str]]:
    """Return the names of parameters by part: a part for each prefix that ends at a dot or slash, and for each matrix.

    Outer parts come first. The tables of tokens and positions, which other checks examine, are left out, and so are
    parts without a matrix, since an unused norm does no harm.
    """
    parts: dict[str, list[str]] = {}
    for name, array in parameters.items():
        if array.dtype.kind != "f" or is_table(name, array, case):
            continue
        for end in re.finditer(r"[./](?!\d+[./])", name):  # a list of blocks is no part, each block is
            parts.setdefault(name[: end.start()], []).append(name)
        if is_matrix(array):
            parts.setdefault(name, []).append(name)
    parts = {part: names for part, names in parts.items() if any(is_matrix(parameters[name]) for name in names)}
    return dict(sorted(parts.items(), key=lambda part: len(re.findall(r"[./]", part[0]))))


def without_effect(case: Case) -> list[str]:
    """Return the outermost parts that have no effect in a model with generic parameters."""
    ids, values = generic_ids(case), with_units_on(case)
    parts = parts_of(values, case)
    end = (1 - SHARE) * case.seconds_left()
    idle: list[str] = []
    with loaded(case, values):
        before = case.logits(ids)
        if not np.isfinite(before).all():
            raise NotApplicable("finite logits with random parameters")
        if case.has("gradient"):
            moved = gradient(case, 2, ids.shape[1])
            parts = {part: names for part, names in parts.items() if not any(moves(moved, name) for name in names)}
        kept = current(case)
        for part, names in parts.items():
            if case.seconds_left() < end:
                break
            if any(part.startswith((outer + ".", outer + "/")) for outer in idle):
                continue
            case.load({**values, **{name: drawn(case, values[name]) for name in names}})
            effect = np.abs(case.logits(ids) - before).max() / before.std()
            if effect <= EQUAL and all(not np.array_equal(kept[name], current(case)[name]) for name in names):
                idle.append(part)
    return without_queries_and_keys(idle, values)


def with_units_on(case: Case) -> Arrays:
    """Return generic parameters, with biases of hidden units near zero where ``dead-units`` can be examined."""
    values = dict(case.once(generic))
    if case.has("gradient"):
        members = layers_of(list(values))
        for label, width in hidden_widths(values, case):
            biases = [name for name in members[label] if values[name].shape == (width,)]
            values.update({name: drawn(case, np.zeros_like(values[name])) for name in biases})
    return values


def moves(gradients: Arrays, name: str) -> bool:
    return name in gradients and bool(np.any(gradients[name]))


def without_queries_and_keys(parts: list[str], parameters: Arrays) -> list[str]:
    """Leave out pairs of matrices that are queries and keys: the only two without effect in a part, of equal width.

    The attention then ignores the past or takes a uniform mean of it, which ``past-ignored`` reports.
    """
    siblings: dict[str, list[str]] = {}
    for part in parts:
        siblings.setdefault(re.sub(r"[^./]*$", "", part), []).append(part)
    return [part for group in siblings.values() for part in group if not is_pair(group, parameters)]


def is_pair(parts: list[str], parameters: Arrays) -> bool:
    matrices = [[a.shape for name, a in parameters.items() if name.startswith(part) and a.ndim == 2] for part in parts]
    if [len(shapes) for shapes in matrices] != [1, 1]:
        return False
    ((a, b),), ((c, d),) = matrices
    return (a == c or b == d) and ((a, b) != (d, c) or a == b)


def stuck_at_zero(case: Case) -> list[str]:
    """Return the matrices of zeros with a gradient of exactly zero, if at least two matrices have another gradient."""
    zeros = [name for name, array in case.once(current).items() if is_matrix(array) and not array.any()]
    if not zeros or not case.has("gradient"):
        return []
    grads = gradient(case, 2, 64)
    if sum(is_matrix(grad) and bool(np.any(grad)) for grad in grads.values()) < 2:
        return []  # an output matrix of zeros stops every gradient, until the first step
    return [name for name in zeros if name in grads and not np.any(grads[name])]
