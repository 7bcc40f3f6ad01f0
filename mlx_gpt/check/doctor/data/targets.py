"""Targets and data: batches with wrong targets, or with the same rows again, and the end-of-text token."""

from __future__ import annotations

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import batches, counted, train_ids, val_ids
from mlx_gpt.check.doctor.probes import probe_length

SHIFTS = (1, 0, 2, -1, 3, -2)
FEWEST = 8  # positions, rows or windows, without which nothing is decided
WRONG_SHIFT = ("samples-worse-than-loss", "initial-loss-off", "loss-not-cross-entropy", "loss-not-the-mean")


def data_shift(case: Case) -> tuple[int | None, float, int]:
    """Return the shift of the targets, the share of targets that agree with it, and how many were compared.

    With a shift of s the target at t is the input at t + s; it should be 1. None: the targets are no shifted inputs.
    Only positions are compared at which s and 1 give different targets, so that repetitions count for neither.
    """
    pairs = [(x, y, counted(x, y, case.vocab_size)) for x, y in case.once(batches)]
    agreement: dict[int, float] = {}
    for s in SHIFTS:
        agree = total = 0
        for x, y, counts in pairs:
            t = np.arange(max(0, -s), x.shape[1] - max(s, 1))
            told_apart = counts[:, t] & ((x[:, t + s] != x[:, t + 1]) if s != 1 else (x[:, t] != x[:, t + 1]))
            agree += int((told_apart & (y[:, t] == x[:, t + s])).sum())
            total += int(told_apart.sum())
        if s == 1 and total < FEWEST:
            raise NotApplicable("batches with longer rows of different tokens")
        agreement[s] = agree / total if total >= FEWEST else 0.0
        if s == 1:
            positions = total
    if agreement[1] >= 0.5:
        return 1, agreement[1], positions
    best = max(SHIFTS, key=lambda s: agreement[s])  # the first of equals
    return (best, agreement[best], positions) if agreement[best] > 0.9 else (None, agreement[1], positions)


def loss_shift(case: Case) -> int:
    """Return by how many places the user's loss shifts the targets itself, as the one of transformers does; else 0.

    Four texts must agree, since the loss of a short text may be lowest at another shift by chance.
    """
    shift = shift_by_a_text(case)
    return shift if shift and all(shift_by_a_text(case) == shift for _ in range(3)) else 0


def shift_by_a_text(case: Case) -> int:
    """Return the shift of the user's loss on one random text, 0 where it is unclear.

    The targets are the tokens whose logit is highest at a position beside other positions, put 0, 1 or 2 places later.
    The loss is lowest for the shift that it applies itself, whether it is a mean or a sum, and also with dropout. The
    relative distance to the second lowest must be half of what the logits lead one to expect.
    """
    if not case.has("loss", "forward") or probe_length(case) < 4:
        return 0
    x = case.ids(1 if case.one_row else 4, probe_length(case))
    logits = case.logits(x).astype(np.float64)
    preferred = (logits - logits.mean(axis=1, keepdims=True)).argmax(axis=-1).astype(np.int32)
    targets = {s: np.roll(preferred, s, axis=1) for s in (0, 1, 2)}
    losses = {s: case.number("loss", x, y) for s, y in targets.items()}
    lowest, second = sorted(losses, key=lambda s: losses[s])[:2]
    normaliser = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)) + logits.max(axis=-1)
    right, other = (
        float((normaliser - np.take_along_axis(logits, targets[s][..., None], axis=-1)[..., 0]).mean()) for s in (0, 1)
    )
    leads = losses[second] - losses[lowest] > 0.5 * abs(losses[lowest]) * (other - right) / max(right, 1e-3)
    return lowest if other > right and leads else 0


def whole_shift(case: Case) -> tuple[int | None, float, int, int]:
    """Return the shift of batches and loss together, the share of targets that agree, and the shift of each."""
    shift, share, _ = case.once(data_shift)
    own = case.once(loss_shift)
    return (None if shift is None else shift + own), share, shift or 0, own


@check("targets-not-shifted", "batches", explains=WRONG_SHIFT)
def targets_not_shifted(case: Case) -> Found:
    """The targets are the inputs themselves, or not the tokens that follow: the loss falls, but the text is gibberish.

    Measured is the share of targets that equal the input s places later, at positions where that is not the next input
    too. A fault if it exceeds 0.9 for an s below 1, or if no s explains the targets and it is below 0.5 for s = 1
    (healthy: 1.0 of the targets that are not ignored; unrelated targets: 0.07 for characters). The shift of a loss that
    shifts the targets itself, as in transformers, is added.
    """
    shift, share, of_data, own = case.once(whole_shift)
    if shift is not None and shift >= 1:
        return None
    if shift is None:
        why = f"only {share:.0%} of the targets are the token after their input, and no other shift explains them"
    else:
        place = "the input itself" if shift == 0 else f"the token {-shift} before it"
        why = f"{share:.0%} of the targets are {place}, where the next token differs: the model learns to copy"
    return {
        "measured": "unrelated" if shift is None else shift,
        "expected": 1,
        "why": why,
        "remedy": "take x = ids[i : i + T] and y = ids[i + 1 : i + T + 1] of the same i",
        "evidence": {"share": share, "shift_of_data": of_data, "shift_of_loss": own},
    }


@check("targets-shifted-twice", "batches", explains=WRONG_SHIFT)
def targets_shifted_twice(case: Case) -> Found:
    """The model is trained to predict the token after the next: the data shifts the targets, and the loss does again.

    Measured as in ``targets-not-shifted``; the shift of the loss is the one of the targets for which it is lowest.
    """
    shift, share, of_data, own = case.once(whole_shift)
    if shift is None or shift < 2:
        return None
    parts = f"the batches shift by {of_data}, the loss by {own}"
    return {
        "measured": shift,
        "expected": 1,
        "why": f"the target is {shift} tokens after the last one that the model reads: {parts}",
        "remedy": "shift once: either in the batches (y = ids[i + 1 : i + T + 1]) or in the loss, not in both",
        "evidence": {"share": share, "shift_of_data": of_data, "shift_of_loss": own},
    }


@check("same-batch-again", "batches", explains=("overfitted",))
def same_batch_again(case: Case) -> Found:
    """Training sees the same few rows again and again, though the corpus has more.

    Measured is the number of different rows in 32 batches, relative to the number of rows or, if that is less, of
    different windows in the corpus: a fault below a half (healthy, rows drawn with replacement: 0.63 and more, with a
    standard deviation below 0.06 from 32 rows on). Without ``train_ids`` only if all batches, or all rows of each
    batch, are equal.
    """
    taken = case.once(batches)
    sizes = {x.shape for x, _ in taken}
    if len(sizes) > 1:
        raise NotApplicable("batches of one shape")
    rows = np.concatenate([x for x, _ in taken])
    different = len(np.unique(rows, axis=0))
    B, T = taken[0][0].shape
    if not case.has("train_ids"):
        one_batch = len(taken) >= 4 and all(np.array_equal(x, taken[0][0]) for x, _ in taken)
        one_row = B >= 4 and all((x == x[0]).all() for x, _ in taken)
        windows = len(rows) if one_batch or one_row else 0
    else:
        ids = case.once(train_ids)
        whole = ids[: len(ids) // T * T].reshape(-1, T)
        windows = len(np.unique(whole[:10_000], axis=0))
    expected = min(len(rows), windows)
    if expected < FEWEST or different >= expected / 2:
        return None
    return {
        "measured": different,
        "expected": expected,
        "why": f"{len(taken)} batches of {B} rows hold {different} different rows; the corpus would give {expected}",
        "remedy": "draw new positions for each batch and row: advance the iterator, and seed it once, not in each step",
        "evidence": {"batches": len(taken), "rows": len(rows), "windows_of_corpus": windows},
    }


@check("end-of-text-never-learned", "end_of_text", "train_ids|batches")
def end_of_text_never_learned(case: Case) -> Found:
    """The end-of-text token is never a target, so generation never ends by itself.

    Exact if the id is not among the training ids. Also a fault if it is the next input at five or more positions and
    never their target, as where padding with the same id is ignored; or if it is no target although, by its share of
    the training ids, 20 or more should be.
    """
    end = int(case.given["end_of_text"])
    why = None
    if case.has("train_ids"):
        ids = case.once(train_ids)
        n = int((ids == end).sum())
        if n == 0 and not (case.has("val_ids") and end in case.once(val_ids)):  # of one text, val_ids is the end
            why = f"id {end} is not among {len(ids):,} training ids"
            text = case.given.get("train_text")
            if isinstance(text, str) and "<|endoftext|>" in text:
                why += ", though <|endoftext|> is in the text: it was encoded as ordinary characters"
    if why is None and case.has("batches"):
        taken = [*{x.tobytes() + y.tobytes(): (x, y) for x, y in case.once(batches)}.values()]  # each once
        targets = sum(int((y == end).sum()) for _, y in taken)
        following = sum(int((x[:, 1:] == end).sum()) for x, _ in taken)
        size = sum(y.size for _, y in taken)
        expected = n * size / len(ids) if case.has("train_ids") else 0
        if targets == 0 and (following >= 5 or expected >= 20):
            why = f"id {end} is none of {size:,} targets, though " + (
                f"it is the next input {following} times: it is ignored, as padding is"
                if following >= 5
                else f"at its share of the training ids {expected:.0f} would be"
            )
    if why is None:
        return None
    return {
        "measured": 0,
        "expected": "at least one target per text",
        "why": why,
        "remedy": "end each text with this id, encode it as one token, and let the loss count it; pad with another id",
        "evidence": {"end_of_text": end},
    }
