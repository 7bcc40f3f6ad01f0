"""Weight tying: head and embedding that are meant to be one matrix, but are two."""

from __future__ import annotations

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.inside import module_of
from mlx_gpt.check.doctor.modules import CONFIGS
from mlx_gpt.check.doctor.parameters import Arrays, current, generic_ids, loaded, require_steady
from mlx_gpt.check.doctor.probes import EQUAL, own_text_or_random
from mlx_gpt.check.doctor.weights.saved import ROUNDING, reloaded, rounded_to

FLAGS = ("tie_word_embeddings", "tie_weights", "tie_embeddings", "tied_embeddings", "weight_tying", "tied", "tie")
ALIKE = 0.5  # cosine of two tables that were equal once
LOGITS = 2**26  # of a call


@check("head-not-tied", "forward", "parameters", "load_parameters", explains=("reload-differs",))
def head_not_tied(case: Case) -> Found:
    """Output head and token embedding should be one matrix but are two copies, which differ after the first step.

    They are meant to be one if the configuration says so, if they are equal, or if their cosine is above 0.5, since
    then they were equal once (trained separately: −0.05 to 0.08). The head is the table whose row v changes the logits
    of token v only. Equal tables are no fault if a training step leaves them equal, or if loading one changes the
    other. If the model's head is its embedding, the reloaded model is examined too: a fault if its logits come from the
    same hidden states by another table. Two tables that are not meant to be one are no fault.
    """
    require_steady(case)
    if case.vocab_size < 3 or case.n_positions < 2:
        raise NotApplicable("vocab_size of at least 3")
    groups = case.once(shared)
    heads = [group for group in groups if is_head(case, group)]
    for head in heads:
        for other in groups:
            alike = other not in heads and rows(case, min(other)).shape == rows(case, min(head)).shape
            if alike and (finding := untied(case, min(head), min(other))) is not None:
                return finding
    if case.has("reload") and heads and not any(group not in heads for group in groups):
        return reloaded_apart(case, min(heads[0]))
    return None


def tables(case: Case) -> dict[str, int]:
    """Return the matrices with an axis as long as the vocabulary, and that axis."""
    return {
        name: array.shape.index(case.vocab_size)
        for name, array in case.once(current).items()
        if array.dtype.kind == "f" and array.ndim == 2 and case.vocab_size in array.shape
    }


def rows(case: Case, name: str) -> np.ndarray:
    """Return a table as (V, C)."""
    return np.moveaxis(case.once(current)[name], case.once(tables)[name], 0)


def with_row(case: Case, names: set[str], row: int) -> Arrays:
    """Return the parameters with one row of some tables replaced by random values, the same in each."""
    values = dict(case.once(current))
    new = case.rng.standard_normal(rows(case, min(names)).shape[1])
    for name in names:
        values[name] = values[name].copy()
        np.moveaxis(values[name], case.once(tables)[name], 0)[row] = new
    return values


def shared(case: Case) -> list[set[str]]:
    """Return the tables as sets of names of the same array: loading it under one name changes it under all."""
    groups: list[set[str]] = []
    for name in case.once(tables):
        group = next((group for group in groups if is_same(case, min(group), name)), None)
        if group is None:
            groups.append({name})
        else:
            group.add(name)
    return groups


def equal_tables(case: Case, first: str, second: str) -> bool:
    return np.array_equal(rows(case, first), rows(case, second))


def is_same(case: Case, first: str, second: str) -> bool:
    if not equal_tables(case, first, second):
        return False
    for name in (first, second):
        with loaded(case, with_row(case, {name}, 0)):
            after = current(case)
        if not np.array_equal(after[first], after[second]):
            return False
    return True


def is_head(case: Case, names: set[str]) -> bool:
    """Return True if a table's row for a token that is not in the text changes the logits of that token only."""
    unread = case.vocab_size - 1
    ids = np.minimum(generic_ids(case), unread - 1)
    before = case.logits(ids)
    with loaded(case, with_row(case, names, unread)):
        moved = np.abs(case.logits(ids) - before).max(axis=(0, 1)) > EQUAL * before.std()
    return bool(moved[unread]) and not moved[:unread].any()


def means_to_tie(case: Case) -> str | None:
    """Return the name of a setting of the module or its configuration that ties the head, None if none does."""
    module = module_of(case)
    for place in [module, *(getattr(module, name, None) for name in CONFIGS)]:
        for name in FLAGS:
            if (place.get(name) if isinstance(place, dict) else getattr(place, name, None)) is True:
                return name
    return None


def untied(case: Case, head: str, embedding: str) -> Found:
    """Return the finding for a head and an embedding of its shape in two arrays."""
    first, second = rows(case, head), rows(case, embedding)
    cosine = float(np.vdot(first, second) / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-30))
    flag = means_to_tie(case)
    if equal_tables(case, head, embedding):
        if not first.any() or not diverge(case, head, embedding):
            return None
        why = f"{head} and {embedding} are two arrays with equal values, which differ after one training step"
    elif flag:
        why = f"{flag} is set, but {head} and {embedding} are two arrays with different values (cosine {cosine:.2g})"
    elif cosine > ALIKE:
        why = f"{head} and {embedding} have a cosine of {cosine:.2g}: they were equal before training"
    else:
        return None
    return {
        "measured": cosine,
        "expected": 1,
        "why": why,
        "remedy": "use the embedding's own array as the head: in MLX logits = wte.as_linear(x), without a second "
        "parameter; in PyTorch head.weight = wte.weight, the Parameter itself, after loading and initialisation",
        "evidence": {"head": head, "embedding": embedding, "cosine": cosine, "setting": flag},
    }


def diverge(case: Case, first: str, second: str) -> bool:
    """Return True if a step, or else the gradient, differs between two equal tables; or if neither is given."""
    ids = own_text_or_random(case, 1 if case.one_row else 2, min(case.n_positions, 32) + 1)
    x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
    if case.has("step") or case.has("new_step"):
        with case.parameters_restored():
            step = case.call("new_step") if case.has("new_step") else case.given["step"]
            case.number("step", x, y, function=step)
            after = current(case)
        if not np.array_equal(after[first], case.once(current)[first]):
            return not np.array_equal(after[first], after[second])
    if case.has("gradient"):
        grads = case.arrays("gradient", x, y)
        return first in grads and second in grads and not np.array_equal(grads[first], grads[second])
    return True


def reloaded_apart(case: Case, head: str) -> Found:
    """Return the finding if the reloaded model has the same hidden states, but another table as its head."""
    saved = case.once(reloaded)
    if saved.difference <= ROUNDING or case.once(rounded_to) is not None:
        return None
    table = rows(case, head).astype(np.float64)
    V, C = table.shape
    T = min(case.n_positions, 32)
    ids = case.ids(min(2 * C, LOGITS // V) // T + 1, T)
    if V < C or ids.size < 1.2 * C:
        return None
    logits, again = (case.logits(ids, *which).reshape(-1, V) for which in (("forward",), ("reload", saved.forward)))
    hidden = np.c_[np.linalg.lstsq(table, logits.T.astype(np.float64), rcond=None)[0].T, np.ones(len(logits))]
    if unexplained(hidden[:, :C] @ table.T, logits) > 1e-3:
        return None  # the head is more than this table
    # (C + 1, V) each; the hidden states after a norm without bias have rank C - 1
    own, other = (np.linalg.lstsq(hidden, target, rcond=1e-4)[0] for target in (logits, again))
    if unexplained(hidden @ other, again) > 1e-3:
        return None  # the hidden states differ
    scale = np.sum(other * own, axis=1) / np.maximum(np.square(own).sum(axis=1), 1e-30)
    if unexplained(own[:C] * scale[:C, None], other[:C]) < 0.1:
        return None  # only the last norm differs
    cosine = float(np.vdot(own[:C], other[:C]) / np.linalg.norm(own[:C]) / np.linalg.norm(other[:C]))
    return {
        "measured": cosine,
        "expected": 1,
        "why": f"the head is {head} itself, but in the reloaded model another table (cosine {cosine:.2g}), while the "
        "hidden states are the same",
        "remedy": "tie head and embedding again after loading, or save the head under its own name",
        "evidence": {"head": head, "cosine": cosine, "where": "reload"},
    }


def unexplained(fit: np.ndarray, target: np.ndarray) -> float:
    """Return the norm of what a fit leaves of a target, relative to the target's."""
    return float(np.linalg.norm(target - fit) / np.linalg.norm(target))
