"""Rules by which a sampler may turn logits into probabilities: the right ones, and the known wrong ones.

A ``Rule`` maps draws of several calls to log-probabilities (N, V) before each, -inf for ids that it never draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.sampling.draws import Draws, log_softmax

Rule = Callable[[Sequence[Draws]], np.ndarray]
Keep = Callable[[np.ndarray], np.ndarray]  # logits (n, V) -> the ids that a setting keeps, (n, V) boolean
Change = Callable[[Draws], np.ndarray]  # logits after a penalty, (n, V)


def twice(logprobs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return log_softmax(np.exp(logprobs) / temperature)


def shifted(logprobs: np.ndarray, shift: int, wraps: bool) -> np.ndarray:
    """Return the log-probabilities of ids plus -1, 0 or 1; without those outside the vocabulary unless they wrap."""
    rolled = np.roll(logprobs, shift, axis=1)
    if shift == 0 or wraps:
        return rolled
    rolled[:, 0 if shift > 0 else -1] = -np.inf
    return log_softmax(rolled)


@dataclass(frozen=True)
class Base:
    """What the sampler draws from with the settings off: the softmax of the logits, or what a fault makes of it.

    ``kind``: "softmax"; "twice", softmax(softmax(logits / temperature)); "outside", softmax(softmax(logits) /
    temperature); "argmax"; "uniform". ``shift`` is added to each id; at the end of the vocabulary it wraps, or
    (``wraps`` false) that draw is not among those judged. ``temperature``: "divides", "ignored", "multiplies" or
    "squared"; ``scale`` multiplies it.
    """

    kind: str = "softmax"
    temperature: str = "divides"
    shift: int = 0
    scale: float = 1.0
    margin: float = 0.0  # rounding of logits
    wraps: bool = True

    @property
    def other(self) -> bool:
        """Return True if other probabilities than the model's are drawn from, with every setting off."""
        return bool(self.shift) or self.scale != 1 or self.kind == "uniform"

    def rule(
        self,
        temperature: float = 1.0,
        keep: Keep | None = None,
        change: Change | None = None,
        cut: str = "after",
        dropped: float = -np.inf,
    ) -> Rule:
        """Return the rule at a temperature, with a penalty ``change``, of the ids that a setting keeps by ``keep``.

        The other ids get the logit ``dropped``. ``cut``: ``keep`` is applied "before" or "after" the division by the
        temperature. Where the softmax is applied twice, also "first", before both, after which ids that were left out
        have a probability again; or "last", after both.
        """
        powers = {"divides": 1, "ignored": 0, "multiplies": -1, "squared": 2}
        t = self.scale * temperature ** powers[self.temperature]

        def of(calls: Sequence[Draws]) -> np.ndarray:
            logits = np.concatenate([call.logits if change is None else change(call) for call in calls])
            if self.kind == "argmax":
                return log_softmax(np.where(logits >= logits.max(axis=1, keepdims=True) - self.margin, 0.0, -np.inf))
            inner, outer = logits / t, 1.0  # what a second softmax is applied to
            if self.kind == "outside":
                inner, outer = logits, t
            kept: Any = True
            if keep is not None and cut != "last":
                kept = keep(logits if cut == "before" else logits / t)
            if self.kind == "uniform":
                return log_softmax(np.where(kept, np.zeros_like(logits), dropped))
            if self.kind == "softmax":
                logprobs = log_softmax(np.where(kept, inner, dropped))
                return shifted(logprobs, self.shift, self.wraps)
            if cut == "first":
                return twice(log_softmax(np.where(kept, inner, dropped)), outer)
            final = twice(log_softmax(inner), outer)
            if keep is not None and cut == "last":
                kept = keep(final)
            return log_softmax(np.where(kept, final, dropped))

        return of


# Cuts -------------------------------------------------------------------------------------------------------------


def highest(logits: np.ndarray, counts: np.ndarray | int, margin: float) -> np.ndarray:
    """Return the ``counts`` most probable ids of each row and those that tie with the last, (n, V) boolean."""
    places = np.broadcast_to(np.clip(counts, 1, logits.shape[1]) - 1, len(logits))
    last = -np.take_along_axis(np.sort(-logits, axis=1), places[:, None], axis=1)
    return logits >= last - margin


def top_k(k: int, margin: float) -> Keep:
    return lambda logits: highest(logits, k, margin)


def top_p(p: float, margin: float, more: int = 0) -> Keep:
    """Keep the fewest most probable ids whose probabilities sum to p (within 1e-4), and ``more``."""

    def keep(logits: np.ndarray) -> np.ndarray:
        sums = np.cumsum(-np.sort(-np.exp(log_softmax(logits)), axis=1), axis=1, dtype=np.float64)
        n = (sums < p + 1e-4).sum(axis=1) + 1
        return highest(logits, n + more, margin)

    return keep


def unsorted_top_p(p: float) -> Keep:
    """Keep the first ids by number whose probabilities sum to p, as without sorting."""

    def keep(logits: np.ndarray) -> np.ndarray:
        probabilities = np.exp(log_softmax(logits))
        return probabilities.cumsum(axis=1) - probabilities < p + 1e-4

    return keep


def lowest(keep: Keep) -> Keep:
    """Keep as many ids as another cut does, but the least probable."""
    return lambda logits: highest(-logits, keep(logits).sum(axis=1), 0.0)


def complement(keep: Keep) -> Keep:
    """Keep the ids that another cut drops; all where it drops none."""

    def other(logits: np.ndarray) -> np.ndarray:
        kept = keep(logits)
        return ~kept | kept.all(axis=1, keepdims=True)

    return other


# The repetition penalty -------------------------------------------------------------------------------------------


def penalized(penalty: float, how: str = "lowers", of: str = "text", times: str = "once") -> Change:
    """Return a repetition penalty, which changes the logits of ids that occurred.

    ``how``: "lowers" is the published rule (Keskar et al. 2019, section 4.1), "raises" its inverse; "divides" and
    "multiplies" do so with all logits, whatever their sign. ``of``: the ids of the "text", of the "new" ids only, or of
    what is "read" in place of the text. ``times``: "once", or once for "each" occurrence.
    """

    def change(draws: Draws) -> np.ndarray:
        changed = draws.logits.copy()
        start = draws.n_prompt if of == "new" else 0
        for t, row in enumerate(changed):
            text = draws.text[start : draws.n_prompt + t].tolist()
            seen = Counter(draws.read[t] if of == "read" and draws.read else text)
            ids = [*seen]
            strength = penalty ** np.array([*seen.values()]) if times == "each" else penalty
            values = row[ids]
            divide = {"lowers": values > 0, "raises": values < 0}.get(how, np.full(len(ids), how == "divides"))
            row[ids] = np.where(divide, values / strength, values * strength)
        return changed

    return change


def of_logprobs(change: Change) -> Change:
    """Apply a penalty to log-probabilities, all of which are negative."""
    return lambda draws: change(Draws(draws.text, draws.n_prompt, log_softmax(draws.logits), draws.read))
