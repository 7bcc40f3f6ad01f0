"""Contract: what a forward pass returns and leaves alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.codes import GROUPS, ORDER
from mlx_gpt.check.doctor.forward.probes import first_call, noise, probe_length

OF_UNREAD_IDS = ("past-ignored", *GROUPS["inputs"], "cache-mismatch", "reload-differs", "loss-not-cross-entropy")


@check("non-finite", "forward", explains=("cache-mismatch", "reported-loss-differs", "samples-worse-than-loss"))
def non_finite(case: Case) -> Found:
    """Logits are NaN or infinite for ordinary texts.

    −inf in every position of a column, as for ids that are never to be chosen, is allowed.
    """
    logits = case.once(first_call)
    bad = np.isnan(logits) | np.isposinf(logits) | (np.isneginf(logits) & ~np.isneginf(logits).all(axis=(0, 1)))
    if not bad.any():
        return None
    position = int(np.argwhere(bad)[0][1])
    return {
        **({} if np.isfinite(logits).any() else {"explains": ORDER}),
        "measured": int(bad.sum()),
        "expected": 0,
        "why": f"{int(bad.sum())} of {bad.size} logits are NaN or infinite, the first at position {position}",
        "remedy": "look for a fully masked row of scores, a division by zero, an overflow in half precision",
        "evidence": {"position": position},
    }


@check("changes-input", "forward")
def changes_input(case: Case) -> Found:
    """A function writes into the ids it is given, so that the caller's text changes."""
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
    """Return whether the logits of ids are those of what forward makes of them, so that some ids are never read."""
    ids, forward, written = case.ids(1, probe_length(case)), case.given["forward"], []

    def watched(ids: np.ndarray) -> Any:
        logits = forward(ids)
        written.append(ids.copy())
        return logits

    logits = case.logits(ids, function=watched)
    with suppress(CallFailed):
        return not np.array_equal(ids, written[-1]) and np.array_equal(logits, case.logits(written[-1]))
    return False
