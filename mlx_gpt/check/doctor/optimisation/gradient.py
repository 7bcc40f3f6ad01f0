"""Compare the gradient with finite differences of the loss, and examine its causality."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse, rms
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.targets import loss_shift
from mlx_gpt.check.doctor.optimisation.evidence import (
    Parameters,
    cross_entropy,
    floating,
    gradient_is_taken,
    own_parameters,
    probe_rows,
)
from mlx_gpt.check.doctor.optimisation.step import frozen
from mlx_gpt.check.doctor.probes import EQUAL, largest, others, probe_length, silent_if_random

DIRECTIONS = 6  # along which derivatives are compared
LENGTHS = (3e-3, 1e-3, 1e-2)  # of a step, relative to the weights
WRONG = 0.003  # misfit of the derivatives, relative to them, that is a fault
SMOOTH = 0.2  # of the misfit: the most by which differences of two lengths may differ
MOST_TRIED = 32  # parameters examined by themselves, to name those that are wrong


@check(
    "future-leak-in-gradient",
    "gradient",
    explains=("past-ignored", "parameters-frozen", "cannot-memorise-a-batch"),
    explained_by=("loss-not-cross-entropy", "non-finite", "length-dependent", "batch-leak"),
)
def future_leak_in_gradient(case: Case) -> Found:
    """The gradient does not match the loss: it flows from a prediction to later tokens, or part of it is cut off.

    Two measures:

    - Other targets at the first position must not change the gradient in later rows of the position table, or in rows
      of an untied token table for later tokens. Threshold: 1e-3 of the largest change (healthy: below 1e-5).
    - Derivatives along six random directions, in which all rows and columns of a matrix weigh equally, are compared
      with central differences of the loss at steps of 0.001 to 0.01 of the weights. All matrices are enlarged to a root
      mean square of 1 / sqrt(width) first, so that attention matters. A fault if the best step and the best common
      factor leave a misfit of 0.3 % (healthy: 0.1 % and less; a matrix transposed or a part cut off: 0.5 to 80 %). Not
      examined if differences at steps of 0.001 and 0.003 disagree by more than a fifth of the misfit, as for a loss
      that is rounded or has kinks (quantized layers, ReLU).
    """
    silent_if_random(case)
    x = case.ids(probe_rows(case, 2), max(1, min(probe_length(case), case.n_positions - 1)))
    y = case.ids(*x.shape)
    return later_rows(case, x, y) or other_than_differences(case, x, y)


def gradient_of(case: Case, x: np.ndarray, y: np.ndarray) -> Parameters:
    return floating(case.arrays("gradient", x.copy(), y.copy()))


def require_repeated(case: Case, x: np.ndarray, y: np.ndarray, first: Parameters) -> None:
    """Raise ``NotApplicable`` if the gradient differs in a second call, as where dropout was left on."""
    again = gradient_of(case, x, y)
    if any(largest(first[name] - again[name]) > EQUAL * largest(first[name]) for name in first):
        raise NotApplicable("a gradient without dropout")


def later_rows(case: Case, x: np.ndarray, y: np.ndarray) -> Found:
    """Return the finding if the targets at position 0 have an effect on the gradient of later positions or tokens."""
    T, place = x.shape[1], 0 if gradient_is_taken(case) else case.once(loss_shift)
    if T < 2 or place >= T:
        return None
    gradient, other = gradient_of(case, x, y), y.copy()
    other[:, place] = others(case, y[:, place])
    changed = gradient_of(case, x, other)
    for name, before in gradient.items():
        later = np.zeros(0, int)
        if before.ndim == 2 and len(before) == case.n_positions > T and not before[T:].any():
            later = np.arange(1, T)
        elif before.ndim == 2 and len(before) == case.vocab_size:
            absent = np.setdiff1d(np.arange(case.vocab_size), x)
            if len(absent) and not before[absent].any():
                later = np.setdiff1d(x[:, 1:], x[:, 0])
        change = np.abs(changed[name] - before)
        size = largest(change)
        if len(later) and size > 0 and largest(change[later]) > 1e-3 * size:
            require_repeated(case, x, y, gradient)
            return {
                "measured": largest(change[later]) / size,
                "expected": 0,
                "why": f"other targets at position 0 change the gradient of later rows of {name}, by "
                f"{largest(change[later]) / size:.2g} of the largest change",
                "remedy": "mask later keys in the backward pass too: check custom gradients of attention",
                "evidence": {"parameter": name},
            }
    return None


def other_than_differences(case: Case, x: np.ndarray, y: np.ndarray) -> Found:
    """Return the finding if directional derivatives differ from central differences of the loss."""
    if not case.has("parameters", "load_parameters"):
        return None
    start = case.once(own_parameters)
    if all(coarse(value) for value in start.values()):
        raise NotApplicable("parameters in float32")
    misfit = misfit_without(case, x, y, [])
    if misfit and (still := still_parameters(case)):
        return misfit_without(case, x, y, still)
    return misfit


def still_parameters(case: Case) -> list[str]:
    """Return the parameters that a step does not move, which ``parameters-frozen`` reports."""
    with suppress(NotApplicable, CallFailed):
        return case.once(frozen)
    return []


def misfit_without(case: Case, x: np.ndarray, y: np.ndarray, still: list[str]) -> Found:
    """Return the finding for derivatives along directions in all parameters but those in ``still``."""
    start = case.once(own_parameters)
    with case.parameters_restored():
        point = {**start, **{name: enlarged(value) for name, value in start.items() if value.ndim == 2}}
        case.load(point)
        gradient = gradient_of(case, x, y)
        names = [name for name in gradient if name in point and name not in still]
        if not any(gradient[name].any() for name in names):
            return None
        parts = [{name: direction(case, gradient[name], point[name]) for name in names} for _ in range(DIRECTIONS)]
        contributions = [{n: float((gradient[n] * part[n]).sum(dtype=np.float64)) for n in names} for part in parts]
        expected = np.array([sum(found.values()) for found in contributions])
        measured: dict[float, np.ndarray] = {}
        for h in LENGTHS:
            measured[h] = np.array([difference(case, x, y, point, part, h) for part in parts])
            if misfit(measured[h], expected)[1] < WRONG:
                break
        best = min(measured, key=lambda h: misfit(measured[h], expected)[1])
        scale, rest = misfit(measured[best], expected)
        if rest < WRONG:
            return None
        case.load(point)
        require_repeated(case, x, y, gradient)
        two = [measured[h] for h in LENGTHS[:2]]
        if not np.isfinite(two).all() or np.linalg.norm(two[0] - two[1]) > SMOOTH * rest * np.linalg.norm(two[1]):
            raise NotApplicable("a loss that is smooth at steps of 0.003 of the weights")
        wrong = []
        for name in names[:MOST_TRIED]:
            one = difference(case, x, y, point, {name: parts[0][name]}, best)
            if abs(one - scale * contributions[0][name]) > 0.2 * max(abs(one), abs(scale * contributions[0][name])):
                wrong.append(name)
    return {
        "measured": rest,
        "expected": 0,
        "why": f"along {DIRECTIONS} random directions the gradient and differences of the loss disagree by {rest:.0%}"
        + (f"; also for {', '.join(wrong[:4])} alone" if wrong else ""),
        "remedy": "check custom gradients, and stop_gradient, detach or no_grad between these parameters and the loss",
        "evidence": {"differences": measured[best].tolist(), "derivatives": expected.tolist(), "parameters": wrong},
    }


def enlarged(matrix: np.ndarray) -> np.ndarray:
    size = rms(matrix)
    return matrix * max(1.0, min(matrix.shape) ** -0.5 / size) if size else matrix


def direction(case: Case, gradient: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a random direction of the weights' size, larger in rows and columns where the gradient is small.

    It is zero for tokens without a gradient: those that are not read, and torch's ``padding_idx``.
    """
    noise = case.rng.standard_normal(gradient.shape, np.float32)
    size = rms(gradient)
    if gradient.ndim == 2 and len(gradient) == case.vocab_size:
        noise *= gradient.any(axis=1, keepdims=True)
    if gradient.ndim == 2 and size:
        for axis in (0, 1):
            noise /= np.sqrt(np.mean(np.square(gradient), axis=axis, keepdims=True)) / size + 0.03
    return noise * np.float32((rms(weights) or 0.1) / (rms(noise) or 1))


def difference(case: Case, x: np.ndarray, y: np.ndarray, point: Parameters, part: Parameters, h: float) -> float:
    """Return the central difference of the loss along a direction."""
    values = []
    for sign in (1, -1):
        case.load({**point, **{name: point[name] + np.float32(sign * h) * part[name] for name in part}})
        values.append(cross_entropy(case, x, y, shift=0) if gradient_is_taken(case) else own_loss(case, x, y))
    return (values[0] - values[1]) / (2 * h)


def own_loss(case: Case, x: np.ndarray, y: np.ndarray) -> float:
    """Return the user's loss, or the cross-entropy where it is not given or has too few digits for differences."""
    return case.number("loss", x, y) if case.once(steady_loss) else cross_entropy(case, x, y)


def steady_loss(case: Case) -> bool:
    """Return True if ``loss`` is given, repeats, and has more digits than half precision."""
    if not case.has("loss"):
        return False
    x = case.ids(1, probe_length(case))
    first = case.number("loss", x, x)
    return first == case.number("loss", x, x) and not coarse(np.array([first]))


def misfit(measured: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the factor, not negative, that fits best, and the norm of the rest relative to the measured values'."""
    square = float(expected @ expected)
    scale = max(float(measured @ expected) / square, 0.0) if square else 0.0
    size = float(np.linalg.norm(measured))
    return scale, float(np.linalg.norm(measured - scale * expected)) / size if size else 0.0
