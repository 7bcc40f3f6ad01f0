"""Contract: a forward pass returns finite logits, and does not change its input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.codes import GROUPS, ORDER
from mlx_gpt.check.doctor.probes import first_call, noise, probe_length

ROWS, CHUNK = 64, 8  # texts at most, in which each id occurs; texts of a call
SECONDS = 1.0  # after which no more of them are read
QUICK = 0.1  # seconds of the slowest call of forward, up to which the gradient is computed here
OF_PROBES = (*GROUPS["state"], *GROUPS["causality"], *GROUPS["inputs"])
OF_NAN = ("cache-mismatch", "reported-loss-differs", "samples-worse-than-loss")
OF_UNREAD_IDS = ("past-ignored", *GROUPS["inputs"], "cache-mismatch", "reload-differs", "loss-not-cross-entropy")
OF_LOSS = ("loss-not-cross-entropy", "loss-not-the-mean", "learning-rate-too-high", "cannot-memorise-a-batch")


@check("non-finite", "forward", explains=OF_NAN)
def non_finite(case: Case) -> Found:
    """Logits, the loss or its gradient are NaN or infinite for ordinary text.

    An id whose logit is −inf at every position of a batch, as for ids that are never to be chosen, is allowed.
    """
    places: list[np.ndarray] = []  # for each text, how many logits are not finite at each position, (T,)
    none_finite = True
    for logits in (case.once(first_call), *logits_of_every_id(case)):
        wrong = np.isnan(logits) | np.isposinf(logits) | (np.isneginf(logits) & ~np.isneginf(logits).all(axis=(0, 1)))
        none_finite &= not np.isfinite(logits).any()
        places += [*wrong.sum(axis=2)]
    bad = int(np.sum(places))
    if not bad:
        return None if case.slow else of_training(case)
    at = np.stack(places) > 0
    position = int(np.argwhere(at)[0][1])
    of_some_ids = bool((at != at[0]).any())  # other probes with these ids are then not finite either
    return {
        "explains": ORDER if none_finite else (*OF_NAN, *OF_PROBES) if of_some_ids else OF_NAN,
        "measured": bad,
        "expected": 0,
        "why": f"{bad} of {at.size * case.vocab_size} logits are NaN or infinite, in {int(at.any(axis=1).sum())} of "
        f"{len(at)} texts, the first at position {position}",
        "remedy": "look for a fully masked row of scores, a division by zero, an overflow in half precision",
        "evidence": {"position": position},
    }


def logits_of_every_id(case: Case) -> Iterator[np.ndarray]:
    """Yield the logits of batches of texts in which all ids of the vocabulary occur, or as many as time allows."""
    T = probe_length(case)
    rows, end = min(ROWS, -(-case.vocab_size // T)), time.monotonic() + SECONDS
    ids = np.resize(case.rng.permutation(case.vocab_size), (rows, T)).astype(np.int32)
    for start in range(0, rows, CHUNK):
        if case.slow or time.monotonic() > end:
            break
        yield case.logits(ids[start : start + CHUNK])


def of_training(case: Case) -> Found:
    """Return the finding of a loss, or of its gradient, that is not finite though the logits are."""
    rows = 1 if case.one_row else 2
    ids = case.ids(rows, probe_length(case) + 1)
    for name, read in (("loss", case.number), ("gradient", case.arrays)):
        if not case.has(name) or (name == "gradient" and case.longest["forward"] > QUICK):
            continue
        try:
            returned = read(name, ids[:, :-1].copy(), ids[:, 1:].copy())
        except CallFailed:  # what other checks report
            continue
        arrays = returned if isinstance(returned, dict) else {name: np.array(returned)}
        wrong = [which for which, array in arrays.items() if not np.isfinite(array).all()]
        if wrong:
            what = f"{name} is" if wrong == [name] else f"{len(wrong)} of {len(arrays)} arrays of {name} are"
            return {
                "explains": (*OF_LOSS, "future-leak-in-gradient"),
                "measured": len(wrong),
                "expected": 0,
                "why": f"{what} NaN or infinite for ordinary ids, though the logits are finite",
                "remedy": "compute the loss from logits, by log-sum-exp, without log(0) or a division by zero",
                "evidence": {"arrays": sorted(wrong)[:8]},
            }
    return None


@check("changes-input", "forward")
def changes_input(case: Case) -> Found:
    """A function writes into the ids that it is given, so the caller's text changes."""
    case.once(noise)
    if not case.changed_inputs:
        return None
    names = sorted(case.changed_inputs)
    return {
        "explains": OF_UNREAD_IDS if reads_what_it_wrote(case) else (),
        "measured": names,
        "expected": "unchanged ids",
        "why": f"{', '.join(names)} wrote into its argument",
        "remedy": "copy the ids before changing them",
        "evidence": {"functions": names},
    }


def reads_what_it_wrote(case: Case) -> bool:
    """Return True if the logits are those of the ids that forward has written, so that the ones given are not read."""
    ids, forward, written = case.ids(1, probe_length(case)), case.given["forward"], []

    def watched(ids: np.ndarray) -> Any:
        logits = forward(ids)
        written.append(ids.copy())
        return logits

    logits = case.logits(ids, function=watched)
    with suppress(CallFailed):
        return not np.array_equal(ids, written[-1]) and np.array_equal(logits, case.logits(written[-1]))
    return False
