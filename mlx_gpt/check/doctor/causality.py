"""Contract, causality, state and inputs: exact properties of a forward pass, checked with random texts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.probes import (
    CLOSE,
    EQUAL,
    between,
    effect,
    effects,
    first_call,
    largest,
    noise,
    others,
    probe_length,
    silent_if_random,
    steady_noise,
)

Found = dict[str, Any] | None
ROWS_OF_LOGITS = 2**22  # numbers in a batch of logits


@check("non-finite", "forward")
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


@check("not-deterministic", "forward")
def not_deterministic(case: Case) -> Found:
    """Two equal calls in evaluation mode differ, as with dropout left on.

    Threshold: relative difference 1e-6; healthy models repeat to the bit (float32, bfloat16, quantized).
    """
    found = case.once(noise)
    if found.relative <= EQUAL or not np.isfinite(found.relative):
        return None
    return {
        "measured": found.relative,
        "expected": 0,
        "why": f"two calls with the same ids differ by {found.relative:.2g} of the logits' standard deviation",
        "remedy": "switch to evaluation mode before generating and evaluating: model.eval() turns dropout off",
        "evidence": {"difference": found.difference, "scale": found.scale},
    }


@check(
    "depends-on-earlier-calls",
    "forward",
    explains=(
        "not-deterministic",
        "row-alone-differs",
        "batch-leak",
        "future-leak",
        "future-leak-in-training",
        "length-dependent",
    ),
)
def depends_on_earlier_calls(case: Case) -> Found:
    """A call's result depends on the calls before it, as with a cache that is never emptied.

    Two texts in the order A B B A, repeated: a pass with state gives A after A and A after B different logits, but A in
    the same place of two rounds more alike. With dropout both differ alike (measured ratios 0.97 to 1.03); state that
    fades gives below 0.1, state that grows below 0.9 from one round to the next. Threshold 0.8.
    """
    case.once(first_call)
    T = probe_length(case)
    texts = {"A": case.ids(1, T), "B": case.ids(1, T)}
    rounds = [[case.logits(texts[name]) for name in "ABBA"] for _ in range(6)][2:]
    firsts, lasts = [one[0] for one in rounds], [one[3] for one in rounds]  # A after A, and A after B
    scale = case.once(steady_noise).scale
    across = mean_square(zip(firsts, lasts, strict=True)) / scale**2
    along = mean_square([*pairwise(firsts), *pairwise(lasts)]) / scale**2
    if across <= EQUAL**2 or along > 0.8 * across:
        return None
    size = float(np.sqrt(across))
    return {
        "measured": size,
        "expected": 0,
        "why": f"the logits of a text differ by {size:.2g} of their standard deviation with the text read before",
        "remedy": "start each call without what earlier ones left: empty the cache, reset buffers and counters",
        "evidence": {"after_another_text": size, "after_the_same": float(np.sqrt(along))},
    }


def mean_square(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([np.square(between(one, two)).mean() for one, two in pairs]))


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

    Tokens from j on are replaced, for several j; no logit before j may move. Threshold: 1e-6 of the logits' standard
    deviation (healthy models: 0, as equal shapes are computed alike; a mask of −10 instead of −inf: 1e-5 and more).
    """
    return leak(case, "forward")


@check("future-leak-in-training", "forward_training")
def future_leak_in_training(case: Case) -> Found:
    """In training mode a position's logits depend on later tokens, though not in evaluation.

    As ``future-leak``, from the mean of 12 calls where dropout is on.
    """
    return leak(case, "forward_training")


def leak(case: Case, name: str) -> Found:
    """Replace the tokens from j on, and look at the logits before j."""
    case.once(first_call)
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    starts = sorted({1, T // 2, T - 1})
    before = np.repeat(case.ids(1, T), len(starts), axis=0)
    after = before.copy()
    for row, start in zip(after, starts, strict=True):
        row[start:] = others(case, row[start:])
    moved = effects(case, before, after, name)
    leaks = [
        (float(row[:start].max()), int(row[:start].argmax()), start) for row, start in zip(moved, starts, strict=True)
    ]
    size, position, start = max(leaks)
    if size <= EQUAL:
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"new tokens from position {start} on move the logits at position {position}, by {size:.2g} of their "
        "standard deviation",
        "remedy": "before the softmax set the scores of later keys, key > query, to −inf, in every layer and mode",
        "evidence": {"position": position, "changed_from": start, "leaks": [size for size, _, _ in leaks]},
    }


@check("batch-leak", "forward", explains=("row-alone-differs", "length-dependent"))
def batch_leak(case: Case) -> Found:
    """A row's logits depend on the other rows of the batch, as after a reshape that mixes batch and time.

    Threshold: 1e-6 of the logits' standard deviation between two batches of equal shape.
    """
    case.once(first_call)
    if case.one_row:
        raise NotApplicable("a forward that takes several rows")
    T = probe_length(case)
    before = case.ids(3, T)
    after = before.copy()
    after[[0, 2]] = case.ids(2, T)
    size = float(effect(case, before, after)[1].max())
    if size <= EQUAL:
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"a row's logits move by {size:.2g} of their standard deviation when only the other rows change",
        "remedy": "check each reshape, transpose and softmax axis: (B, T, C) -> (B, T, H, D) -> (B, H, T, D)",
        "evidence": {},
    }


@check("row-alone-differs", "forward")
def row_alone_differs(case: Case) -> Found:
    """A row has other logits alone than in a batch.

    Threshold: 2e-3 of the logits' standard deviation, since other shapes round differently.
    """
    case.once(first_call)
    if case.one_row:
        raise NotApplicable("a forward that takes several rows")
    ids = case.ids(3, probe_length(case))
    found = case.once(steady_noise)
    size = largest(between(case.logits(ids)[:1], case.logits(ids[:1]))) / found.scale
    if size <= max(CLOSE, 20 * found.relative):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"a row's logits alone and in a batch of three differ by {size:.2g} of their standard deviation",
        "remedy": "look for a squeeze, a broadcast or a position table that treats one row differently",
        "evidence": {},
    }


@check("token-blind", "forward", explains=("past-ignored", "context-too-short", "position-blind"))
def token_blind(case: Case) -> Found:
    """The logits do not depend on the tokens at all."""
    silent_if_random(case)
    T = probe_length(case)
    size = float(effect(case, case.ids(1, T), case.ids(1, T)).max())
    if size > EQUAL:
        return None
    return {
        "measured": size,
        "expected": "above 0",
        "why": "two different texts have the same logits",
        "remedy": "check that the embedding of the ids reaches the first block, and that no part multiplies it by zero",
        "evidence": {},
    }


@check("past-ignored", "forward", explains=("context-too-short", "position-blind"))
def past_ignored(case: Case) -> Found:
    """No earlier token has any effect on a prediction: attention passes nothing on.

    Threshold: 1e-6 of the logits' standard deviation; untrained healthy models move by 1e-3 and more.
    """
    silent_if_random(case)
    T = probe_length(case)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    before, after = case.ids(1, T), case.ids(1, T)
    after[:, -1] = before[:, -1]
    size = float(effect(case, before, after)[0, -1])
    if size > EQUAL:
        return None
    return {
        "measured": size,
        "expected": "above 0",
        "why": f"replacing all {T - 1} tokens before the last does not change the prediction after it",
        "remedy": "check that the mask allows key <= query, and that the attention output is added to the stream",
        "evidence": {},
    }


@check("context-too-short", "forward")
def context_too_short(case: Case) -> Found:
    """Only the last few tokens have any effect, though the context is said to be longer.

    The first token, the first quarter, and so on are replaced in a text as long as the context (at most 256).
    """
    silent_if_random(case)
    T = min(case.n_positions, 256)
    if T < 4:
        raise NotApplicable("n_positions of at least 4")
    cuts = [cut for cut in (1, T // 4, T // 2, 3 * T // 4, T - 2) if cut]
    before = np.repeat(case.ids(1, T), len(cuts), axis=0)
    after = before.copy()
    for row, cut in zip(after, cuts, strict=True):
        row[:cut] = others(case, row[:cut])
    reached = [cut for cut, row in zip(cuts, effects(case, before, after), strict=True) if row[-1] > EQUAL]
    if reached and reached[0] == cuts[0]:
        return None
    unseen = max(cut for cut in cuts if not reached or cut < reached[0])
    return {
        "measured": T - unseen,
        "expected": T,
        "why": f"replacing the first {unseen} of {T} tokens does not change the last prediction",
        "remedy": "check the mask's lower edge, the length of the cache and how the text is cut before it is read",
        "evidence": {"unseen": unseen, "length": T},
    }


@check("position-blind", "forward")
def position_blind(case: Case) -> Found:
    """The order of the earlier tokens has no effect: positions are not used.

    A text of one token repeated has equal logits everywhere only if positions are unused or purely relative. The two
    are told apart by the logits of a token after n times another one. Without positions they are a smooth function of
    n, of which sixth differences leave only rounding; rotary positions add an oscillation of one radian a token (Su et
    al. 2021). Measured is its power over that of higher frequencies: without positions 1 to 3.5, rotary 70 and more,
    at weights of 0.02 to 0.3. Threshold 15. Other relative positions, such as ALiBi, are not told apart.
    """
    case.once(first_call)
    T = min(case.n_positions, 64)
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    found = case.once(steady_noise)
    constant = case.logits(np.full((1, T), case.ids(1, 1)[0, 0], np.int32))
    if largest(between(constant, constant[:, :1])) / found.scale > max(1e-4, 20 * found.relative):
        return None
    if T < 48 or found.relative > EQUAL:
        raise NotApplicable("n_positions of at least 48 and a forward pass without dropout")
    measured = oscillation(case, T)
    if measured > 15:
        return None
    return {
        "measured": measured,
        "expected": "above 15",
        "why": "the logits do not depend on where a token stands, only on which tokens came before",
        "remedy": "add a position embedding to the token's, or rotate queries and keys, with positions 0, 1, 2, ...",
        "evidence": {},
    }


def oscillation(case: Case, T: int, pairs: int = 6) -> float:
    """Return the power at one radian a token, over that of higher frequencies, in the logits after n equal tokens."""
    counts = np.arange(3 * T // 8, T)
    frequencies = np.array([1.0, *np.arange(1.8, 3.1, 0.1)])
    power = np.zeros(len(frequencies))
    rows = max(1, ROWS_OF_LOGITS // (T * case.vocab_size))
    for _ in range(pairs):
        repeated, last = case.rng.choice(case.vocab_size, 2, replace=False)
        texts = np.full((len(counts), T), repeated, np.int32)
        texts[np.arange(len(counts)), counts] = last
        parts = [(texts[i : i + rows], counts[i : i + rows]) for i in range(0, len(counts), rows)]
        logits = np.concatenate([case.logits(some)[np.arange(len(some)), at] for some, at in parts])
        differences = np.diff(logits.astype(np.float64), n=6, axis=0)  # (n, V)
        window = np.hanning(len(differences) + 2)[1:-1, None]
        waves = np.exp(-1j * frequencies[:, None] * np.arange(len(differences)))
        power += np.square(np.abs(waves @ (differences * window))).sum(axis=1) / (2 * np.sin(frequencies / 2)) ** 12
    return float(power[0] / max(np.median(power[1:]), 1e-30))


@check("length-dependent", "forward", explains=("cache-mismatch",))
def length_dependent(case: Case) -> Found:
    """A prefix has other logits alone than at the beginning of a longer text, though no token of the future matters.

    Threshold: 2e-3 of the logits' standard deviation.
    """
    case.once(first_call)
    T = probe_length(case)
    if T < 4:
        raise NotApplicable("n_positions of at least 4")
    ids = case.ids(1, T)
    found = case.once(steady_noise)
    whole = case.logits(ids)
    sizes = {
        n: largest(between(whole[:, :n], case.logits(ids[:, :n]))) / found.scale for n in sorted({2, T // 2, T - 1})
    }
    n, size = max(sizes.items(), key=lambda item: item[1])
    if size <= max(CLOSE, 20 * found.relative):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"the first {n} tokens have other logits alone than in a text of {T}: by {size:.2g} of their standard "
        "deviation",
        "remedy": "count positions from the beginning of the text, and never normalise or scale over the time axis",
        "evidence": {"lengths": {str(n): size for n, size in sizes.items()}},
    }
