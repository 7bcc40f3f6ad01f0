"""Evidence of training: a batch to step on, the cross-entropy of forward's logits, and the first updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.data.evidence import Batch, batches, train_ids
from mlx_gpt.check.doctor.data.targets import loss_shift
from mlx_gpt.check.doctor.module_arguments import arguments_of
from mlx_gpt.check.doctor.optimisation.fresh import fresh_step
from mlx_gpt.check.doctor.probes import first_call, probe_length

Parameters = dict[str, np.ndarray]
ROWS = 8  # of a batch to step on
MOST_CALLS = 16  # of a step, in which the parameters should move
STEP = ("parameters", "load_parameters", "step|new_step")  # arguments that a check of updates needs


def probe_rows(case: Case, rows: int) -> int:
    """Return ``rows``, or 1 where forward takes one row at a time."""
    case.once(first_call)
    return 1 if case.one_row else rows


def train_batch(case: Case) -> Batch:
    """Return a batch to step on: rows of the user's first batch, else windows of the corpus, else random ids.

    Ids outside the vocabulary in y mark targets that are ignored.
    """
    rows = probe_rows(case, ROWS)
    if case.has("batches"):
        x, y = case.once(batches)[0]
        if x.shape[1] <= case.n_positions and x.min() >= 0 and x.max() < case.vocab_size:
            first = x[:rows].astype(np.int32), y[:rows].astype(np.int32)
            return first if accepts(case, *first) else (x.astype(np.int32), y.astype(np.int32))
    T = probe_length(case)
    if case.has("train_ids"):
        ids = case.once(train_ids)
        inside = len(ids) > T + 1 and ids.min() >= 0 and int(ids.max()) < case.vocab_size
        if inside:
            starts = case.rng.integers(0, len(ids) - T, rows)[:, None] + np.arange(T)
            return ids[starts].astype(np.int32), ids[starts + 1].astype(np.int32)
    return case.ids(rows, T), case.ids(rows, T)


def accepts(case: Case, x: np.ndarray, y: np.ndarray) -> bool:
    """Return True if the user's loss or gradient accepts a batch of this size."""
    name = next((name for name in ("loss", "gradient") if case.has(name)), None)
    try:
        if name is not None:
            case.call(name, x.copy(), y.copy())
    except CallFailed:
        return False
    return name is not None or "module" in case.given


def negative_logprobs(logits: np.ndarray) -> np.ndarray:
    """Return the cross-entropy for each token as the target, in nats: logits (..., V) -> (..., V) float64."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)) - logits


def at_targets(costs: np.ndarray, y: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cross-entropies of the targets, and which of them count, (B, T - shift) each.

    ``costs``: the cross-entropy for each token, (B, T, V). ``shift``: by which the loss shifts the targets itself.
    """
    T, V = costs.shape[1:]
    y = y[:, shift:]
    counts = (y >= 0) & (y < V)
    picked = np.take_along_axis(costs[:, : T - shift], np.where(counts, y, 0)[..., None], axis=-1)[..., 0]
    return picked, counts


def cross_entropy(case: Case, x: np.ndarray, y: np.ndarray, shift: int | None = None) -> float:
    """Return the mean cross-entropy of forward's logits and the targets that count, in nats, shifted as in the loss."""
    shift = case.once(loss_shift) if shift is None else shift
    picked, counts = at_targets(negative_logprobs(case.logits(x)), y, shift)
    return float(picked[counts].mean()) if counts.any() else float("nan")


def gradient_is_taken(case: Case) -> bool:
    """Return True if the gradient is one that was taken from the module, of forward's cross-entropy, not the user's."""
    return getattr(case.given.get("gradient"), "__module__", "") == arguments_of.__module__


def floating(values: Parameters) -> Parameters:
    return {name: value for name, value in values.items() if value.dtype.kind == "f" and value.size}


def own_parameters(case: Case) -> Parameters:
    """Return the floating parameters as they are before anything is changed."""
    if not case.has("parameters"):
        raise NotApplicable("parameters")
    return floating(case.arrays("parameters"))


@dataclass(frozen=True)
class FirstSteps:
    """Steps of one fresh optimizer on one batch: the parameters before, what each step adds, and its loss."""

    before: Parameters
    updates: list[Parameters]
    losses: list[float]
    logits: tuple[np.ndarray, np.ndarray]  # before and after

    def still(self) -> list[str]:
        """Return the names of the parameters that no step moved."""
        return [name for name in self.before if not any(update[name].any() for update in self.updates)]


def first_steps(case: Case) -> FirstSteps:
    """Make steps on the batch: three, or up to 16 while nothing moves, as in a warmup, or accumulation over calls."""
    if not case.has("load_parameters"):
        raise NotApplicable("load_parameters")
    x, y = case.once(train_batch)
    with case.parameters_restored():
        before = last = case.once(own_parameters)
        logits = case.logits(x[:1])
        step = fresh_step(case)
        updates: list[Parameters] = []
        losses: list[float] = []
        while len(updates) < 3 or (
            len(updates) < MOST_CALLS and not any(u.any() for update in updates for u in update.values())
        ):
            losses.append(step(x, y))
            if not np.isfinite(losses[0]) and not np.isnan(logits).any():
                raise CallFailed("step", "non-finite", f"step returned {losses[0]} at its first call")
            now = floating(case.arrays("parameters"))
            updates.append({name: now[name] - last[name] for name in last if name in now})
            last = now
        after = case.logits(x[:1])
    return FirstSteps(before, updates, losses, (logits, after))


def update_of(case: Case, x: np.ndarray, y: np.ndarray) -> Parameters:
    """Return what the first step of a fresh optimizer adds to the parameters."""
    with case.parameters_restored():
        before = case.once(own_parameters)
        fresh_step(case)(x, y)
        now = floating(case.arrays("parameters"))
    return {name: now[name] - before[name] for name in before if name in now}


def given_gradient(case: Case) -> Parameters:
    """Return the user's gradient for the batch, by the names of the parameters."""
    return floating(case.arrays("gradient", *(part.copy() for part in case.once(train_batch))))


def spacing(values: np.ndarray) -> float:
    """Return the distance between neighbouring floating-point numbers at the largest of the values."""
    size = np.abs(values).max(initial=0)
    return float(np.spacing(np.float32(size))) * (2**16 if coarse(values) else 1)


def untrained(case: Case) -> bool:
    """Return True if all norm weights, taken to be the vectors with a mean near 1, are still exactly 1.

    Not in half precision, in which training at usual rates leaves them at 1.
    """
    values = case.once(own_parameters).values()
    near_one = [v for v in values if v.ndim == 1 and v.size > 3 and 0.5 < v.mean() < 1.5]
    if all(map(coarse, values)):
        return False
    return bool(near_one) and all((vector == 1).all() for vector in near_one)
