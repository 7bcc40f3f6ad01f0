"""Contract: what a forward pass returns and leaves alone."""

from __future__ import annotations

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, check
from mlx_gpt.check.doctor.codes import ORDER
from mlx_gpt.check.doctor.forward.probes import first_call, noise


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
        "measured": names,
        "expected": "unchanged ids",
        "why": f"{', '.join(names)} wrote into its argument",
        "remedy": "copy the ids before changing them",
        "evidence": {"functions": names},
    }
