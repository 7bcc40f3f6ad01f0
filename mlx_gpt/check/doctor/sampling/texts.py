"""Compute the logits after many texts in few calls, where the model allows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.probes import first_call, silent_if_random

NUMBERS = 2e7  # logits of one call
FORBIDDEN = -1e9  # logit of an id that a model masks
ROUNDING = 0.05  # of the logits' standard deviation; bfloat16: below 0.03 between shapes


@dataclass(frozen=True)
class Shapes:
    """``prefixes``, ``rows``: True if the tokens after a text, and other rows, do not change its logits.

    ``rounding``: by how much calls of other shapes may change them. ``scale``: their standard deviation.
    """

    prefixes: bool
    rows: bool
    rounding: float
    scale: float


def finite(logits: np.ndarray) -> np.ndarray:
    """Return logits with ``FORBIDDEN`` in place of -inf. Raises ``NotApplicable`` for NaN and inf."""
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise NotApplicable("finite logits")
    return np.maximum(logits, FORBIDDEN)


def shapes(case: Case) -> Shapes:
    """Compare a text's logits with those of its prefixes by themselves, and with those among other rows.

    A small difference is rounding, unless a check of the forward pass has found it to be a leak.
    """
    prefix, row, scale = case.once(moved)
    prefixes = prefix <= ROUNDING * scale and not case.found.keys() & {"future-leak", "length-dependent"}
    rows = row <= ROUNDING * scale and not case.found.keys() & {"batch-leak", "row-alone-differs"}
    most = max(prefix if prefixes else 0.0, row if rows else 0.0)
    return Shapes(prefixes, rows, float(np.clip(4 * most, 1e-5 * scale, ROUNDING * scale)), scale)


def moved(case: Case) -> tuple[float, float, float]:
    """Return by how much later tokens and other rows move a text's logits, and the logits' standard deviation."""
    silent_if_random(case)
    case.once(first_call)
    T = min(case.n_positions, 16)
    ids = case.ids(4, T)
    whole = finite(case.logits(ids[:1]))[0]
    scale = float(whole[whole > FORBIDDEN].std()) or 1.0
    ends = sorted({max(1, T // 4), max(1, T // 2), max(1, T - 1)})
    prefix = max(float(np.abs(finite(case.logits(ids[:1, :t]))[0] - whole[:t]).max()) for t in ends)
    row = float(np.abs(finite(case.logits(ids))[0] - whole).max())
    return prefix, row, scale


def logits_after(case: Case, texts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Return the logits after each text, (N, V) float32, as in generation, where the text is the whole input.

    A text that is the beginning of another is read with it, unless the tokens after it change its logits, since a fault
    of the forward pass must not be taken for one of the sampler.
    """
    form = shapes(case)
    asked = [tuple(np.asarray(text).tolist()) for text in texts]
    where: dict[tuple[int, ...], tuple[int, ...]] = {}  # text -> the text with which it is read
    longer: tuple[int, ...] = ()
    for text in sorted(set(asked), reverse=True):  # a text follows those that it begins
        if not (form.prefixes and longer[: len(text)] == text):
            longer = text
        where[text] = longer
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for text in dict.fromkeys(where.values()):
        groups[len(text)].append(text)
    found: dict[tuple[int, ...], np.ndarray] = {}
    begun: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for text, reading in where.items():
        begun[reading].append(text)
    for length, group in groups.items():
        rows = max(1, int(NUMBERS // (length * case.vocab_size))) if form.rows else 1
        for start in range(0, len(group), rows):
            chunk = group[start : start + rows]
            for reading, logits in zip(chunk, finite(case.logits(np.array(chunk))), strict=True):
                found |= {text: logits[len(text) - 1].copy() for text in begun[reading]}
    return np.stack([found[text] for text in asked])


def rounding(case: Case) -> float:
    """Return a bound on how far the sampler's logits may be from forward's, as its shapes differ."""
    return shapes(case).rounding


def below(case: Case, texts: Iterable[Sequence[int] | np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return how far the logit of an id after each text is below the largest, (N,)."""
    logits = logits_after(case, texts)
    return logits.max(axis=1) - logits[np.arange(len(ids)), ids]
