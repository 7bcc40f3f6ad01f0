"""Causality: a prediction depends on earlier tokens of its own row, and on nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from mlx_gpt.check.doctor.arrays import named_arrays
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.inside import module_of
from mlx_gpt.check.doctor.module_arguments import arguments_of
from mlx_gpt.check.doctor.parameters import current, drawn, effect_at_last, generic, loaded
from mlx_gpt.check.doctor.probes import (
    EQUAL,
    between,
    close_within,
    effects,
    equal_within,
    first_call,
    largest,
    others,
    probe_length,
    silent_unless_seeded,
    steady_noise,
    training_noise,
)

OTHER, RANDOM = 3, 30  # times a leak in evaluation, from which one in training is another fault; with dropout


@check(
    "future-leak",
    "forward",
    explains=(
        "future-leak-in-training",
        "future-leak-in-gradient",
        "cache-mismatch",
        "past-ignored",
        "context-too-short",
        "length-dependent",
    ),
)
def future_leak(case: Case) -> Found:
    """A position's logits depend on later tokens: the causal mask is missing, inverted, or too weak.

    The tokens from position j on are replaced, for several j; no logit before j may move. Threshold: 1e-6 of the
    logits' standard deviation (healthy models: 0, since equal shapes are computed alike; a mask of −10 instead of −inf:
    1e-5 and more). Beside ``row-alone-differs`` it is a fault of its own if a batch of two rows leaks too.
    """
    finding = leak(case, "forward")
    if finding is None or "row-alone-differs" not in case.found:
        return finding
    return {**finding, "separate": leak(case, "forward", rows=2) is not None}


@check("future-leak-in-training", "forward_training", explains=("future-leak-in-gradient",))
def future_leak_in_training(case: Case) -> Found:
    """A position's logits depend on later tokens in training mode, though not in evaluation mode.

    Measured as ``future-leak``, with the same seeds before and after the replacement where dropout is on. Beside a leak
    in evaluation it is a fault of its own if it is three times as large for one of the replacements; with dropout, 30
    times (by chance, as the mean of four calls: up to 14 times; a mask of −8 in evaluation and none in training: 100
    and more).
    """
    finding = leak(case, "forward_training")
    by_state = "depends-on-earlier-calls" in case.found and case.primer is None  # in both modes
    if finding is None or "future-leak" not in case.found or by_state:
        return finding
    pairs = zip(finding["evidence"]["leaks"], case.found["future-leak"]["evidence"]["leaks"], strict=True)
    most = OTHER if case.once(training_noise).relative <= EQUAL else RANDOM
    return {**finding, "separate": any(leaked > most * before for leaked, before in pairs)}


def leak(case: Case, name: str, rows: int = 1) -> Found:
    """Return the finding if replacing the tokens from j on moves logits before j, for one of several j."""
    case.once(first_call)
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    starts = sorted({1, T // 2, T - 1})
    text, other = case.once(leak_texts)
    changed = [np.stack([np.concatenate([text[:start], other[start:]])] * rows) for start in starts]
    moved = [its[0] for its in effects(case, np.stack([text] * rows), changed, name)]
    leaks = [
        (float(row[:start].max()), int(row[:start].argmax()), start) for row, start in zip(moved, starts, strict=True)
    ]
    size, position, start = max(leaks)
    sizes = [
        *(size for size, _, _ in leaks),
        float(moved[-1][0]),
    ]  # and the effect of the last token on the first position
    if size <= equal_within(case):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"new tokens from position {start} on move the logits at position {position}, by {size:.2g} of their "
        "standard deviation",
        "remedy": "before the softmax set the scores of later keys, key > query, to −inf, in every layer and mode; "
        "take the softmax over the keys, and normalise over features, not over time",
        "evidence": {"position": position, "changed_from": start, "leaks": sizes},
    }


def leak_texts(case: Case) -> np.ndarray:
    """Return two texts that differ in every token: (2, T). Both modes are examined with the same ones."""
    (text,) = case.ids(1, probe_length(case))
    return np.stack([text, others(case, text)])


@check(
    "batch-leak",
    "forward",
    explains=("row-alone-differs", "past-ignored", "token-blind", "position-blind", "cache-mismatch"),
)
def batch_leak(case: Case) -> Found:
    """A row's logits depend on the other rows of the batch, as after a reshape that mixes batch and time.

    Each of three rows in turn is kept while the others are replaced. Threshold: 1e-6 of the logits' standard deviation,
    since both batches have the same shape.
    """
    case.once(first_call)
    if case.one_row:
        raise NotApplicable("a forward that takes several rows")
    before, new = case.ids(3, probe_length(case)), case.ids(3, probe_length(case))
    changed = [np.where(np.arange(3)[:, None] == row, before, new) for row in range(3)]
    size = max(float(moved[row].max()) for row, moved in enumerate(effects(case, before, changed)))
    if size <= equal_within(case):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"a row's logits move by {size:.2g} of their standard deviation when only the other rows change",
        "remedy": "check each reshape, transpose and softmax axis: (B, T, C) -> (B, T, H, D) -> (B, H, T, D)",
        "evidence": {},
    }


@check("row-alone-differs", "forward", explains=("future-leak",))
def row_alone_differs(case: Case) -> Found:
    """A text has different logits alone than as one row of a batch.

    The first and the last of three rows. Threshold: 2e-3 of the logits' standard deviation, or 0.05 in half precision,
    since calls of other shapes round differently.
    """
    case.once(first_call)
    if case.one_row:
        raise NotApplicable("a forward that takes several rows")
    ids = case.ids(3, probe_length(case))
    noise = case.once(steady_noise)
    together = case.logits(ids)
    size = max(largest(between(together[[row]], case.logits(ids[[row]]))) for row in (0, -1)) / noise.scale
    if size <= max(close_within(case), 20 * noise.relative):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"a row's logits alone and in a batch of three differ by {size:.2g} of their standard deviation",
        "remedy": "look for a squeeze, a broadcast or a position table that treats one row differently",
        "evidence": {},
    }


@check("past-ignored", "forward", explains=("context-too-short", "position-blind"))
def past_ignored(case: Case) -> Found:
    """No earlier token has any effect on a prediction: attention passes nothing on.

    All tokens before the last are replaced, also with random parameters where these can be loaded. Threshold: 1e-6 of
    the logits' standard deviation; the logits of untrained healthy models move by 1e-3 and more. Also a fault is
    attention that takes a uniform mean of the past: the gradient of queries and keys is exactly zero, while that of
    values is not. Where no gradient is given, that of the module that forward calls is computed.
    """
    silent_unless_seeded(case)
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    before, after = case.ids(1, T), case.ids(1, T)
    after[:, -1] = before[:, -1]
    size = effect_at_last(case, before, after)
    if size > EQUAL:
        finding = uniform_mean(case)
        if finding and case.has("parameters", "load_parameters"):  # a saturated softmax has no gradient either
            with loaded(case, case.once(generic)):
                return uniform_mean(case)
        return finding
    return {
        "measured": size,
        "expected": "above 0",
        "why": f"replacing all {T - 1} tokens before the last does not change the prediction after it",
        "remedy": "check that the mask allows key <= query, and that the output is added: x = x + attention(norm(x))",
        "evidence": {},
    }


QUERY_OR_KEY = re.compile(r"(?:^|[._])(?:w?[qk]|w_[qk]|query|key|[qk]_?proj)(?:[._]|$)", re.IGNORECASE)


def uniform_mean(case: Case) -> Found:
    """Return the finding for queries and keys without a gradient, in their own matrices or in one with the values."""
    gradient = available_gradient(case, case.ids(1, probe_length(case)), case.ids(1, probe_length(case)))
    moved = {name: bool(array.any()) for name, array in gradient.items()}
    names = [name for name, array in gradient.items() if values_alone(array)]
    for name in gradient:
        if match := QUERY_OR_KEY.search(name):
            siblings = [other for other in gradient if other.startswith(name[: match.start()]) and other != name]
            alike = [moved[other] for other in siblings if QUERY_OR_KEY.search(other)]
            if alike and not moved[name] and not any(alike) and any(moved[other] for other in siblings):
                names.append(name)
    if not names:
        return None
    return {
        "measured": 0,
        "expected": "above 0",
        "why": f"queries and keys have no gradient ({names[0]}): attention takes a uniform mean of the past",
        "remedy": "check that the softmax is taken of q kᵀ / √d, over the keys, and that nothing multiplies it by zero",
        "evidence": {"parameters": names},
    }


def available_gradient(case: Case, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradient that is given, else that of the module if its logits are forward's, else {}."""
    if case.has("gradient"):
        gradient = case.arrays("gradient", x, y)
        return {**gradient, **unused(case, x, gradient)}
    if (module := module_of(case)) is None:
        return {}
    with suppress(CallFailed):  # the module found is not the model, or takes other arguments
        taken, _ = case.call_function("module", arguments_of, module)
        theirs = case.logits(x, "module", taken["forward"])
        if largest(between(theirs, case.logits(x))) <= close_within(case) * case.once(steady_noise).scale:
            return case.call_function("module", lambda: named_arrays(taken["gradient"](x, y)))
    return {}


def unused(case: Case, ids: np.ndarray, gradient: Iterable[str]) -> dict[str, np.ndarray]:
    """Return zeros for queries and keys that the gradient leaves out because they have no effect, not as frozen."""
    values = current(case) if case.has("parameters", "load_parameters") else {}
    absent = {name: value for name, value in values.items() if name not in gradient and QUERY_OR_KEY.search(name)}
    if not absent or case.once(steady_noise).relative > EQUAL:
        return {}
    before = case.logits(ids)
    with loaded(case, {**values, **{name: drawn(case, value) for name, value in absent.items()}}):
        same = largest(between(case.logits(ids), before)) <= EQUAL * case.once(steady_noise).scale
    return {name: np.zeros_like(value) for name, value in absent.items()} if same else {}


def values_alone(array: np.ndarray) -> bool:
    """Return True if of a fused matrix only the values have a gradient: its last third, or each head's (GPT-NeoX)."""
    if array.ndim != 2 or 3 * min(array.shape) != max(array.shape):
        return False
    moved, width = array.any(axis=int(np.argmin(array.shape))), min(array.shape)
    heads = (moved.reshape(H, 3, -1) for H in range(1, 33) if width % H == 0)
    return any(bool(parts[:, 2].any()) and not parts[:, :2].any() for parts in heads)
