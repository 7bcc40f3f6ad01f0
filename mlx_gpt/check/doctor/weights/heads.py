"""Heads that are split or merged along the wrong axes."""

from __future__ import annotations

from itertools import product

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.parameters import (
    alone,
    current,
    drawn,
    generic,
    generic_ids,
    is_matrix,
    layers_of,
    loaded,
    require_steady,
)
from mlx_gpt.check.doctor.probes import EQUAL, others

HEADS = range(2, 33)
SHARE = 0.1  # of the time that is left, in which layers are tried


@check(
    "heads-mixed-up",
    "forward",
    explains=(
        "future-leak",
        "future-leak-in-training",
        "cache-mismatch",
        "length-dependent",
        "context-too-short",
        "past-ignored",
        "batch-leak",
        "row-alone-differs",
    ),
)
def heads_mixed_up(case: Case) -> Found:
    """Heads mix positions: (B, T, C) was reshaped to (B, H, T, D), or back, without a transpose.

    Such a reshape gives a head chunks of wrong tokens, in an order that follows from T and H. Measured is the (T, T)
    pattern of which positions depend on which tokens, for each layer by itself: the parameters are random, and the
    matrices of the other layers zero. A fault if the pattern equals, at two lengths and without tolerance, the one that
    a reshape without a transpose of queries, keys, values or outputs gives for 2 to 32 heads; a healthy layer has the
    causal pattern. Where no transpose is done at all, attention runs over the heads of one token: a layer of which no
    position depends on another token, though all its matrices have an effect.
    """
    require_steady(case)
    ids = generic_ids(case)
    if not case.has("parameters", "load_parameters"):
        return described({"the model": match(case, ids, depth=8)})
    layers = list(layers_of([name for name, array in case.once(generic).items() if is_matrix(array)]).items())
    with loaded(case, case.once(generic)):
        if looks_causal(case, ids[:, :12]):
            return None
    end = (1 - SHARE) * case.seconds_left()
    mistakes = {}
    for label, names in layers or [("the model", list(case.once(generic)))]:
        with loaded(case, alone(case, names, layers)):
            mistakes[label] = match(case, ids, depth=1) or across_heads(case, ids, names)
        if case.seconds_left() < end:
            break
    return described(mistakes)


def described(mistakes: dict[str, str | None]) -> Found:
    mixed = {label: mistake for label, mistake in mistakes.items() if mistake}
    if not mixed:
        return None
    return {
        "measured": list(mixed),
        "expected": "each position depends on all earlier ones and itself",
        "why": f"in {', '.join(mixed)} positions depend on each other as after {next(iter(mixed.values()))}",
        "remedy": "split with x.reshape(B, T, H, D).transpose(0, 2, 1, 3), merge with "
        "z.transpose(0, 2, 1, 3).reshape(B, T, H * D); in PyTorch transpose(1, 2)",
        "evidence": {"layers": mixed},
    }


def looks_causal(case: Case, ids: np.ndarray) -> bool:
    """Return True if positions depend on all earlier tokens and no later one, and a prefix alone has equal logits."""
    T = ids.shape[1]
    whole, part = case.logits(ids), case.logits(ids[:, :-1])
    steady = np.abs(whole[:, :-1] - part).max() <= 2e-3 * whole.std()
    return bool(steady) and np.array_equal(dependence(case, ids, together=True), np.tri(T, dtype=bool))


def dependence(case: Case, ids: np.ndarray, together: bool = False) -> np.ndarray:
    """Return whether the logits of position t depend on token s: (T, T) bool, indexed [t, s].

    Texts are read one at a time, since rows may leak into each other; ``together`` in one batch, which is faster.
    """
    T = ids.shape[1]
    after = np.repeat(ids, T + 1, axis=0)  # the last row stays
    after[range(T), range(T)] = others(case, ids[0])
    logits = case.logits(after) if together else np.concatenate([case.logits(row[None]) for row in after])
    differs = np.abs(logits[:-1] - logits[-1]).max(axis=-1) > EQUAL * logits[-1].std()
    return differs.T


def match(case: Case, ids: np.ndarray, depth: int) -> str | None:
    """Return the mistaken reshape that explains the dependence at two lengths, None if none does.

    ``depth``: the most layers over which the dependence of one layer spreads.
    """
    T = ids.shape[1]
    if T < 4:
        raise NotApplicable("n_positions of at least 4")
    measured = [dependence(case, ids[:, :n]) for n in (T, T - 1)]
    if has_other_cause(measured[0]):
        return None
    for H, (tensors, (sources, merged)) in product(range(2, min(max(HEADS), T // 2) + 1), MISTAKES.items()):
        layer = [pattern(len(one), H, sources, merged) for one in measured]
        reached = layer
        for _ in range(depth):
            if all(np.array_equal(one, two) for one, two in zip(measured, reached, strict=True)):
                return f"a reshape of {tensors} without a transpose, at {H} heads"
            reached = [one @ two for one, two in zip(reached, layer, strict=True)]
    return None


def has_other_cause(depends: np.ndarray) -> bool:
    """Return True for the patterns of causal attention, of no attention, and of attention without a mask."""
    T = len(depends)
    return any(np.array_equal(depends, other) for other in (np.tri(T), np.eye(T), np.ones((T, T))))


# Tensors that are reshaped without a transpose -> how queries, keys and values are split, as ``token_of`` counts the
# mistakes, and whether the heads' output is merged by a reshape alone.
MISTAKES: dict[str, tuple[tuple[int, int, int], bool]] = {
    "queries, keys, values and the output": ((1, 1, 1), True),
    "queries, keys and values": ((1, 1, 1), False),
    "the output": ((0, 0, 0), True),
    "queries, keys and values as one": ((2, 3, 4), False),
    "queries, keys and values as one, and of the output": ((2, 3, 4), True),
    "queries": ((1, 0, 0), False),
    "keys, perhaps of queries too,": ((0, 1, 0), False),  # both have one pattern
    "values, perhaps of queries too,": ((0, 0, 1), False),
}


def token_of(T: int, H: int, mistake: int) -> np.ndarray:
    """Return which token each position of each head holds, (H, T).

    ``mistake``: 0 for none, 1 for a reshape of (T, C), 2 to 4 for the first to third part of a reshape of (T, 3 C).
    """
    flat = np.arange(H * T).reshape(H, T)
    if mistake == 0:
        return flat % T
    return flat // H if mistake == 1 else ((mistake - 2) * H * T + flat) // (3 * H)


def pattern(T: int, H: int, sources: tuple[int, int, int], merged: bool) -> np.ndarray:
    """Return which tokens each position depends on after causal attention with mistaken reshapes: (T, T) bool."""
    q, k, v = (np.eye(T, dtype=bool)[token_of(T, H, source)] for source in sources)  # (H, T, T)
    scores = q | np.logical_or.accumulate(k, axis=1)
    scores[:, 0] = False  # the softmax of one score is 1
    z = scores | np.logical_or.accumulate(v, axis=1)
    gathered = z.reshape(T, H, T).any(axis=1) if merged else z.any(axis=0)
    return gathered | np.eye(T, dtype=bool)


def across_heads(case: Case, ids: np.ndarray, names: list[str]) -> str | None:
    """Return the mistake of attention over the heads of one token, None if it is not that.

    No position depends on another token, but queries and keys have an effect. In attention of a token to itself alone
    they have none, since the softmax of one score is 1.
    """
    if not np.array_equal(dependence(case, ids), np.eye(ids.shape[1])):
        return None
    values = current(case)
    matrices = [name for name in names if is_matrix(values[name])]
    thirds = [(name, part) for name in matrices for part in thirds_of(values[name])]
    shapes = [values[name][part].shape for name, part in thirds]
    if sum(shape[-1] == shape[-2] for shape in shapes) < 4:  # queries, keys, values, output
        return None
    before = case.logits(ids)
    for name, part in thirds:  # one without effect is the queries or keys of attention to the token itself
        changed = values[name].copy()
        changed[part] = drawn(case, changed[part])
        case.load({**values, name: changed})
        if np.abs(case.logits(ids) - before).max() <= EQUAL * before.std():
            return None
    return "attention over the heads of one token, for lack of a transpose"


def thirds_of(matrix: np.ndarray) -> list[tuple[slice, ...]]:
    """Return slices of a matrix: its thirds if it is three times as long as wide, as of fused queries, keys, values."""
    if matrix.ndim != 2:
        return [(slice(None),)]
    width = min(matrix.shape)
    if max(matrix.shape) != 3 * width:
        return [(slice(None),)]
    cuts = [slice(i * width, (i + 1) * width) for i in range(3)]
    return [(cut,) if len(matrix) > width else (slice(None), cut) for cut in cuts]
