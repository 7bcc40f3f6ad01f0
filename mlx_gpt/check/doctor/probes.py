"""Probes that all groups of checks share: texts, noise between identical calls, the effect of a change of the text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.arrays import coarse
from mlx_gpt.check.doctor.calls import seeded
from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.inside import has_half, module_of

LENGTH, SHORT = 32, 8  # tokens of a probe, where the context has as many; SHORT for a slow model
SLOW = 0.2  # seconds that a call with a short text takes in a slow model; with a longer text twice that
# Differences of logits, relative to their standard deviation, up to which they are taken to be equal.
EQUAL = 1e-6  # in calls of the same shape; healthy models: 0 (float32, bfloat16, 4 bits)
STEADY = 1e-5  # in identical calls that begin in the same state, of a forward pass that keeps state
CLOSE = 2e-3  # in calls of different shapes, which round differently; healthy: below 4e-6 in float32
CLOSE_IN_HALF = 0.05  # the same in half precision; healthy: up to 0.016 (bfloat16 and float16 in PyTorch)
CALLS = 12  # of a random forward pass, to average
SEEDS = 4  # with which a random forward pass is called, where it repeats with a seed


@dataclass(frozen=True)
class Noise:
    """The largest difference between two identical calls, and the logits' scale, their standard deviation."""

    difference: float
    scale: float

    @property
    def relative(self) -> float:
        return self.difference / self.scale


def equal_within(case: Case) -> float:
    """Return the relative difference up to which calls of equal shapes count as equal."""
    return EQUAL if case.primer is None else STEADY


def close_within(case: Case) -> float:
    """Return the relative difference up to which calls of different shapes count as equal."""
    return CLOSE_IN_HALF if case.once(in_half_precision) else CLOSE


def in_half_precision(case: Case) -> bool:
    """Return True if logits or all matrices have the digits of half precision, or a part of the module its type."""
    arrays = case.arrays("parameters") if case.has("parameters") else {}
    matrices = [array for array in arrays.values() if array.ndim > 1 and array.dtype.kind == "f"]
    if coarse(case.once(first_call)) or (matrices and all(map(coarse, matrices))):
        return True
    module = module_of(case)
    return module is not None and has_half(module)


def probe_length(case: Case) -> int:
    return min(SHORT if case.slow else LENGTH, case.n_positions)


def first_call(case: Case) -> np.ndarray:
    """Return the logits of one random text; set ``case.slow`` and ``case.one_row`` by how forward behaves."""
    case.slow = True
    case.logits(case.ids(1, probe_length(case)))
    case.slow = case.longest.get("forward", 0.0) > SLOW
    logits = case.logits(case.ids(1, probe_length(case)))
    case.slow = case.slow or case.longest.get("forward", 0.0) > 2 * SLOW
    ids = case.ids(1, probe_length(case))
    try:
        case.logits(np.concatenate([ids, ids]))
    except CallFailed:
        case.one_row = True
    return logits


def own_text_or_random(case: Case, rows: int, length: int) -> np.ndarray:
    """Return ids (rows, length) of the user's text; random ids where there is no text, or it holds other values."""
    text = own_text(case, rows, length)
    return case.ids(rows, length) if text is None else text


def own_text(case: Case, rows: int, length: int) -> np.ndarray | None:
    """Return ids (rows, length) from random places of the training or validation ids; None without a usable text."""
    for name in ("train_ids", "val_ids"):
        ids = case.given.get(name, np.zeros(0, int))
        if len(ids) > length:
            starts = case.rng.integers(0, len(ids) - length, rows)
            text = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
            if text.min() >= 0 and text.max() < case.vocab_size:
                return text.astype(np.int32)
    return None


def noise(case: Case) -> Noise:
    """Compare two identical calls of forward."""
    return noise_of(case, "forward")


def steady_noise(case: Case) -> Noise:
    """Compare two identical calls of the forward pass that further checks use.

    Where forward is random only by the dropout layers of a module, these are turned off for all further checks.
    """
    usual = case.once(noise)
    if usual.relative > EQUAL and case.has("forward_without_dropout"):
        quiet = noise_of(case, "forward_without_dropout")
        if quiet.relative <= EQUAL:
            case.given["forward"] = case.given["forward_without_dropout"]
            return quiet
    return usual


def training_noise(case: Case) -> Noise:
    """Compare two identical calls in training mode."""
    return noise_of(case, "forward_training")


def noise_of(case: Case, name: str) -> Noise:
    case.once(first_call)
    ids = case.ids(2, probe_length(case))
    first, second = case.logits(ids, name), case.logits(ids, name)
    finite = first[np.isfinite(first)]
    scale = float(finite.std()) if finite.size else 0.0
    return Noise(largest(between(first, second)), scale or 1.0)


def silent_if_random(case: Case) -> None:
    """Raise ``NotApplicable`` if identical calls differ: no effect could not be told from a small one."""
    if case.once(steady_noise).relative > EQUAL:
        raise NotApplicable("a forward pass without dropout")


def silent_unless_seeded(case: Case) -> None:
    """Raise ``NotApplicable`` if identical calls differ even with the same seed."""
    if case.once(steady_noise).relative > EQUAL and not case.once(repeats_with_seed):
        raise NotApplicable("a forward pass without dropout")


def largest(difference: np.ndarray) -> float:
    """Return the largest magnitude: infinity where one side is not finite, 0 of nothing."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0))


def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the difference of two arrays, 0 where both have NaN or the same infinity."""
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    return np.where(same, 0, np.subtract(first, second, where=~same, out=np.zeros_like(first)))


def repeats_with_seed(case: Case) -> bool:
    """Return True if a random forward pass repeats with the same seed of its library, as dropout does."""
    return same_with_seed(case, "forward")


def training_repeats_with_seed(case: Case) -> bool:
    return same_with_seed(case, "forward_training")


def same_with_seed(case: Case, name: str) -> bool:
    ids = case.ids(2, probe_length(case))
    first, second = (seeded_logits(case, ids, name, seed=0) for _ in range(2))
    return largest(between(first, second)) <= EQUAL * case.once(steady_noise).scale


def seeded_logits(case: Case, ids: np.ndarray, name: str, seed: int) -> np.ndarray:
    with seeded(seed):
        return case.logits(ids, name)


def mean_logits(case: Case, ids: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error of the logits over some calls."""
    many = np.stack([case.logits(ids, name) for _ in range(CALLS)])
    return many.mean(axis=0), np.nan_to_num(many.std(axis=0, ddof=1) / np.sqrt(CALLS))


def effect(case: Case, before: np.ndarray, after: np.ndarray, name: str = "forward") -> np.ndarray:
    """Return how far the logits of two sets of texts differ, by row and position, relative to their scale: (B, T).

    For a random forward pass, the mean difference of calls with the same seeds, which is exactly 0 without an effect;
    where seeds do not make it repeat, by how much the difference of the means exceeds six standard errors.
    """
    (found,) = effects(case, before, [after], name)
    return found


def effects(case: Case, before: np.ndarray, changed: Iterable[np.ndarray], name: str = "forward") -> list[np.ndarray]:
    """Return ``effect`` for each changed set of texts. Each set is read by a call of its own."""
    training = name == "forward_training"
    if case.once(training_noise if training else steady_noise).relative <= EQUAL:
        unchanged = case.logits(before, name)
        differences = [np.abs(between(unchanged, case.logits(after, name))) for after in changed]
    elif case.once(training_repeats_with_seed if training else repeats_with_seed):
        by_seed = [seeded_logits(case, before, name, seed) for seed in range(SEEDS)]
        differences = [
            np.abs(np.mean([between(by_seed[i], seeded_logits(case, after, name, i)) for i in range(SEEDS)], axis=0))
            for after in changed
        ]
    else:
        mean, error = mean_logits(case, before, name)
        means = [mean_logits(case, after, name) for after in changed]
        differences = [np.abs(between(mean, two)) - 6 * np.sqrt(error**2 + its**2) for two, its in means]
    scale = case.once(steady_noise).scale
    return [np.nan_to_num(np.maximum(size, 0), nan=np.inf).max(axis=-1) / scale for size in differences]


def others(case: Case, ids: np.ndarray) -> np.ndarray:
    """Return random ids that differ from the given ones at every position: (T,) -> (T,)."""
    shift = case.rng.integers(1, max(case.vocab_size, 2), len(ids))
    return ((ids + shift) % case.vocab_size).astype(np.int32)
