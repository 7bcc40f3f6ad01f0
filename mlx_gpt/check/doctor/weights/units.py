"""Hidden units of the MLP that are inactive for every token."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.parameters import (
    Arrays,
    current,
    drawn,
    gradient,
    is_matrix,
    is_table,
    layers_of,
    loaded,
)
from mlx_gpt.check.doctor.probes import own_text, own_text_or_random

DEAD = 1e-5  # of the largest gradient of a layer's units: below it a unit is dead
SHARE, OF_RANDOM = 0.02, 0.2  # of a layer's units that may be dead, on the user's text and on random tokens
TOKENS = (128, 1024, 8192)  # of one call; of all calls while units seem dead, at least and at most
GROWN, CLOSE = 1.1, 1e-5  # factor of an MLP's matrices, and the relative change of the logits without an effect
TIME = 0.05  # of the time that is left, for these calls


@check("dead-units", "parameters", "gradient")
def dead_units(case: Case) -> dict[str, Any] | None:
    """Hidden units of an MLP are inactive for every token of a text, and training cannot revive them.

    Measured is the gradient of the loss with respect to the weights into a unit and out of it. A unit is dead if both
    are below 1e-5 of the largest of its layer (inactive ReLU: exactly 0; GELU at −8: 1e-14). One alone may be zero
    behind a projection that is initialised to zero. Units behind a gate that is zero do not count: it is set to another
    value to see. Nor do those of an MLP without any gradient whose matrices, times 1.1, change the logits. A warning
    above 2 % of a layer's units on 8,192 tokens of the user's text (1,024 and more if time is short), or, without a
    text, above 20 % on random tokens, which are new to a trained model (a healthy one with ReLU: 11 %).
    """
    widths = hidden_widths(case.once(current), case)
    if not widths:
        raise NotApplicable("parameters named by layer, with two matrices of the MLP's width")
    largest: dict[tuple[str, int], np.ndarray] = {}
    end = (1 - TIME) * case.seconds_left()
    seen = 0
    dead: dict[tuple[str, int], int] = {}
    T = min(case.n_positions, TOKENS[0])
    least = OF_RANDOM if own_text(case, 1, T + 1) is None else SHARE
    while not seen or (dead and seen < TOKENS[2] and case.seconds_left() > end):
        grads = gradient(case, max(1, TOKENS[0] // T), T)
        seen += T if case.one_row else TOKENS[0]
        for key, names in widths.items():
            if all(name in grads for name in names):
                norms = np.stack([unit_norms(grads[name], key[1]) for name in names])
                largest[key] = np.maximum(largest.get(key, 0), norms.max(axis=0))
        dead = {key: n for key, norms in largest.items() if (n := count_dead(norms)) > least * key[1]}
    if dead and seen < TOKENS[1]:
        raise NotApplicable("minutes")
    for key in [key for key, n in dead.items() if n == key[1]]:
        if case.has("load_parameters") and (behind_a_gate(case, widths[key], key[1]) or active(case, widths[key])):
            del dead[key]
    if not dead:
        return None
    shares = {label: n / width for (label, width), n in dead.items()}
    worst = max(dead, key=lambda key: dead[key] / key[1])
    return {
        "measured": shares[worst[0]],
        "expected": 0,
        "why": f"{dead[worst]} of {worst[1]} hidden units of {worst[0]} are inactive for each of {seen} tokens: no "
        "gradient reaches their weights",
        "remedy": "lower the learning rate or the initial scale, check the bias before the activation, or use GELU",
        "evidence": {"dead": {label: n for (label, _), n in dead.items()}, "shares": shares, "tokens": seen},
    }


def hidden_widths(parameters: Arrays, case: Case) -> dict[tuple[str, int], list[str]]:
    """Return (layer, hidden width of its MLP) -> the MLP's matrices: at least two, of which it is the larger size.

    Sizes of the tables do not count, such as the width of the stream, which matrices of single heads have too.
    """
    tables = {size for name, array in parameters.items() if is_table(name, array, case) for size in array.shape}
    tables |= {case.vocab_size, case.n_positions}
    hidden: dict[tuple[str, int], list[str]] = {}
    for label, names in layers_of(list(parameters)).items():
        for name in names:
            array = parameters[name]
            if is_matrix(array) and array.shape[-1] != array.shape[-2] and max(array.shape[-2:]) not in tables:
                hidden.setdefault((label, max(array.shape[-2:])), []).append(name)
    return {key: names for key, names in hidden.items() if len(names) > 1}


def behind_a_gate(case: Case, names: list[str], width: int) -> bool:
    """Return True if units get a gradient once parameters that are all zero, such as a gate, are not."""
    opened = {name: array if array.any() else drawn(case, array) for name, array in case.once(current).items()}
    with loaded(case, opened):
        grads = gradient(case, 2, 64)
    return count_dead(np.stack([unit_norms(grads[name], width) for name in names]).max(axis=0)) < width


def active(case: Case, names: list[str]) -> bool:
    """Return True if the logits change with an MLP's matrices: its units are active, and cut off from the gradient."""
    ids = own_text_or_random(case, 1, min(case.n_positions, TOKENS[0]))
    before = case.logits(ids)
    with loaded(case, {name: array * (GROWN if name in names else 1) for name, array in case.once(current).items()}):
        return float(np.abs(case.logits(ids) - before).max()) > CLOSE * float(before.std())


def unit_norms(grad: np.ndarray, width: int) -> np.ndarray:
    """Return the norm of the gradient of each hidden unit's weights: (width,)."""
    axis = -1 if grad.shape[-1] == width else -2
    return np.sqrt(np.square(np.moveaxis(grad, axis, 0).reshape(width, -1).astype(np.float64)).sum(axis=1))


def count_dead(norms: np.ndarray) -> int:
    return int((norms <= DEAD * norms.max()).sum())
