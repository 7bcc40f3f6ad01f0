"""Inputs: tokens, their positions and the whole context have an effect."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.parameters import alone, effect_at_last, loaded, matrices_by_layer
from mlx_gpt.check.doctor.probes import (
    CLOSE,
    EQUAL,
    between,
    close_within,
    effect,
    effects,
    first_call,
    in_half_precision,
    largest,
    others,
    probe_length,
    silent_unless_seeded,
    steady_noise,
)

ROWS_OF_LOGITS = 2**22  # logits of one call


@check("token-blind", "forward", explains=("past-ignored", "context-too-short", "position-blind"))
def token_blind(case: Case) -> Found:
    """The logits do not depend on the tokens at all."""
    silent_unless_seeded(case)
    T = probe_length(case)
    size = effect_at_last(case, case.ids(1, T), case.ids(1, T))
    if size > EQUAL:
        return None
    return {
        "measured": size,
        "expected": "above 0",
        "why": "two different texts have the same logits",
        "remedy": "check that the embedding of the ids reaches the first block, and that no part multiplies it by zero",
        "evidence": {},
    }


@check("context-too-short", "forward")
def context_too_short(case: Case) -> Found:
    """Only the last few tokens have any effect on a prediction, though n_positions is larger.

    In a text as long as the context, at most 256 tokens, the first token is replaced; if that has no effect, in eight
    more texts, also with random parameters where these can be loaded. Then the first quarter, half, three quarters, and
    all but two are. Threshold: 1e-6 of the logits' standard deviation at the last position. If a few tokens before the
    last have an effect, no other fault explains it; if none has, an inverted mask may.
    """
    silent_unless_seeded(case)
    T = min(case.n_positions, 8 * probe_length(case))
    if T < 4:
        raise NotApplicable("n_positions of at least 4")
    cuts = [cut for cut in (1, T // 4, T // 2, 3 * T // 4, T - 2) if cut]
    text = case.ids(1, T)
    changed = [np.concatenate([others(case, text[0, :cut]), text[0, cut:]])[None] for cut in cuts]
    if effect(case, text, changed[0])[0, -1] > EQUAL or effect_at_last(case, *first_replaced(case, T)) > EQUAL:
        return None
    moved = [rows[0, -1] for rows in effects(case, text, changed)]
    reached = [cut for cut, size in zip(cuts, moved, strict=True) if size > EQUAL]
    unseen = max(cut for cut in cuts if not reached or cut < reached[0])
    return {
        "separate": bool(reached) and not {"past-ignored", "changes-input", "non-finite"} & case.found.keys(),
        "measured": T - unseen,
        "expected": T,
        "why": f"replacing the first {unseen} of {T} tokens does not change the last prediction",
        "remedy": "check the mask for a window of the last tokens, the length of the cache, and how the text is cut",
        "evidence": {"unseen": unseen, "length": T},
    }


def first_replaced(case: Case, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts, (8, T), and the same with another first token."""
    texts = case.ids(8, T)
    return texts, np.column_stack([others(case, texts[:, 0]), texts[:, 1:]])


@check("position-blind", "forward")
def position_blind(case: Case) -> Found:
    """The order of the earlier tokens has no effect: positions are not used.

    Without positions, and with purely relative ones, a text of one repeated token has equal logits at every position;
    any other model is sound. The two are told apart in one of these ways:

    - A table of positions has a gradient in its first row only: a fault.
    - Where parameters can be loaded, each layer is examined by itself, with random parameters and the matrices of the
      other layers zero: a fault if exchanging two earlier tokens moves the last logits in no layer (2e-5 of their
      standard deviation, see ``rounding``), since attention without positions is a function of the set of tokens. Exact
      for any depth, context and number of heads (ALiBi with one head and slope 1/256: 1e-3).
    - Elsewhere, in contexts of 48 and more, a fault if neither biases nor rotary positions show. Biases: among n equal
      tokens another one is moved from the last place but one to the place before; the change over the token's whole
      effect, times n, is 0.1 to 0.4 without positions and above 2 with biases (threshold 1). Rotary positions (Su et
      al. 2021): the logits after n equal tokens oscillate with n at one radian a token; the power at this frequency
      over that at higher ones is 1 to 3.5 without positions, and 70 and more with (threshold 15).
    """
    case.once(first_call)
    T = min(case.n_positions, 2 * probe_length(case))
    if T < 2:
        raise NotApplicable("n_positions of at least 2")
    noise = case.once(steady_noise)
    rows = 2 if "row-alone-differs" in case.found else 1  # a row alone may have no positions
    constant = case.logits(np.full((rows, T), case.ids(1, 1)[0, 0], np.int32))
    constant = constant[:, np.isfinite(constant).any(axis=(0, 2))]
    if largest(between(constant, constant[:, :1])) / noise.scale > max(1e-4, 20 * noise.relative):
        return None
    if table := unused_table(case):
        return blind(0, "above 0", f"; {table} has no gradient") | {"separate": "token-blind" not in case.found}
    if noise.relative > EQUAL or case.vocab_size < 3:
        raise NotApplicable("a forward pass without dropout")
    if T > 2 and case.has("parameters", "load_parameters"):
        size, limit = exchange(case, T), case.once(rounding)
        return None if size > limit else blind(size, f"above {limit:.2g}")
    if T < 48:
        raise NotApplicable("load_parameters")
    limit, measured = 15.0, oscillation(case, T)
    return None if moved_by_one(case, T) > 1 or measured > limit else blind(measured, f"above {limit:g}")


def exchange(case: Case, T: int) -> float:
    """Return how far exchanging two earlier tokens moves the last logits, relative, the most for any layer alone.

    Raises ``NotApplicable`` if no layer alone reads earlier tokens, as with weights that are packed in integers.
    """
    layers, sizes, ids = list(matrices_by_layer(case).items()), [], case.ids(3, T)
    close = close_within(case)
    ids[:, -2] = others(case, ids[:, 0])
    ids[1:] = ids[0]
    ids[1, [0, -2]] = ids[0, [-2, 0]]
    ids[2, -2] = ids[0, 0]
    for _, names in layers or [("", [])]:
        with loaded(case, alone(case, names, layers)):
            plain, exchanged, other = (case.logits(row[None])[0, -1] for row in ids)
        scale = max(float(plain.std()), 1e-30)
        if largest(between(plain, other)) / scale > close:
            sizes.append(largest(between(plain, exchanged)) / scale)
            if sizes[-1] > close:
                break
    if not sizes:
        raise NotApplicable("a layer that reads earlier tokens by itself")
    return max(sizes)


def blind(measured: float, expected: str, remark: str = "") -> dict[str, Any]:
    return {
        "measured": measured,
        "expected": expected,
        "why": f"the logits do not depend on where a token stands, only on which tokens came before{remark}",
        "remedy": "add an embedding of positions to that of tokens, or rotate queries and keys",
        "evidence": {},
    }


def rounding(case: Case) -> float:
    """Return how far sound logits of other shapes may differ, by how far a batch changes those of single tokens."""
    if case.one_row or case.once(in_half_precision):
        return close_within(case)
    ids, scale = case.ids(32, 1), case.once(steady_noise).scale
    batch, alone = case.logits(ids), np.concatenate([case.logits(row[None]) for row in ids[:4]])
    return float(np.clip(20 * largest(between(batch[:4], alone)) / scale, 2e-5, CLOSE))


def unused_table(case: Case) -> str | None:
    """Return the name of a parameter of n_positions rows whose gradient is zero but for the first row."""
    if not case.has("gradient", "parameters"):
        return None
    x, y = case.ids(1, probe_length(case)), case.ids(1, probe_length(case))
    gradient = case.arrays("gradient", x, y)
    for name, values in case.arrays("parameters").items():
        table = values.ndim == 2 and len(values) == case.n_positions > 2 and name in gradient
        if table and not gradient[name][1:].any() and len(np.unique(values)) > 2:  # a mask has two values
            return name
    return None


def moved_by_one(case: Case, T: int) -> float:
    """Return by how much the effect of a token changes from distance 1 to distance 2, relative to the effect, times T.

    The token is placed in a text of one repeated token. The lower quartile of twelve such texts, since a token that the
    repeated ones attend to has a second effect.
    """
    changes = []
    for _ in range(12):
        repeated, moved, last = case.rng.choice(case.vocab_size, 3, replace=False)
        rows = np.full((3, T), repeated, np.int32)
        rows[:, -1], rows[1, -2], rows[2, -3] = last, moved, moved
        without, near, far = case.logits(rows)[:, -1].astype(np.float64)
        changes.append(np.linalg.norm(near - far) / max(float(np.linalg.norm(near - without)), 1e-30))
    return T * float(np.quantile(changes, 0.25))


def oscillation(case: Case, T: int, pairs: int = 6) -> float:
    """Return how strongly the logits after n equal tokens oscillate with n at one radian a token.

    The power at that frequency over the median of those at higher frequencies.
    """
    counts = np.arange(3 * T // 8, T)
    frequencies = np.array([1.0, *np.arange(1.8, 3.1, 0.1)])
    power = np.zeros(len(frequencies))
    rows = max(1, ROWS_OF_LOGITS // (T * case.vocab_size))
    for _ in range(pairs):
        repeated, last = case.rng.choice(case.vocab_size, 2, replace=False)
        texts = np.full((len(counts), T), repeated, np.int32)
        texts[np.arange(len(counts)), counts] = last
        parts = [(texts[i : i + rows], counts[i : i + rows]) for i in range(0, len(counts), rows)]
        logits = np.concatenate([case.logits(part)[np.arange(len(part)), at] for part, at in parts])
        differences = np.diff(logits.astype(np.float64), n=6, axis=0)  # (n, V)
        window = np.hanning(len(differences) + 2)[1:-1, None]
        waves = np.exp(-1j * frequencies[:, None] * np.arange(len(differences)))
        power += np.square(np.abs(waves @ (differences * window))).sum(axis=1) / (2 * np.sin(frequencies / 2)) ** 12
    return float(power[0] / max(np.median(power[1:]), 1e-30))


@check("length-dependent", "forward", explains=("cache-mismatch",))
def length_dependent(case: Case) -> Found:
    """The first tokens of a text have other logits alone than with more text after them, whatever that text is.

    A prefix is compared alone and in a longer text. Threshold: 2e-3 of the logits' standard deviation, 0.05 in half
    precision, or 2e-5 where the number of rows, which changes rounding only, moves the logits by less than 1e-6.
    """
    case.once(first_call)
    T = probe_length(case)
    if T < 4:
        raise NotApplicable("n_positions of at least 4")
    ids = case.ids(1, T)
    noise = case.once(steady_noise)
    whole = case.logits(ids)
    sizes = {
        n: largest(between(whole[:, :n], case.logits(ids[:, :n]))) / noise.scale for n in sorted({2, T // 2, T - 1})
    }
    n, size = max(sizes.items(), key=lambda item: item[1])
    if size <= max(case.once(rounding), 20 * noise.relative):
        return None
    return {
        "measured": size,
        "expected": 0,
        "why": f"the first {n} tokens have other logits alone than in a text of {T}: by {size:.2g} of their standard "
        "deviation",
        "remedy": "count positions from the beginning of the text, and never normalise or scale over the time axis",
        "evidence": {"lengths": {str(n): size for n, size in sizes.items()}},
    }
