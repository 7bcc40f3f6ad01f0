"""Targets and data: ids outside the vocabulary, repetitions in the corpus, and its size."""

from __future__ import annotations

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import (
    MOST_IDS,
    batches,
    grams,
    occurs,
    power_below,
    train_ids,
    val_ids,
)


@check("ids-outside-vocabulary", "train_ids|val_ids|batches")
def ids_outside_vocabulary(case: Case) -> Found:
    """The data holds ids outside the vocabulary, for which MLX reads unrelated memory without an error.

    Exact. Targets may be negative, which marks those to ignore; inputs may not.
    """
    places = {
        name: case.once(read) for name, read in (("train_ids", train_ids), ("val_ids", val_ids)) if case.has(name)
    }
    if case.has("batches"):
        places["x of batches"] = np.concatenate([x.reshape(-1) for x, _ in case.once(batches)])
        targets = np.concatenate([y.reshape(-1) for _, y in case.once(batches)])
        places["y of batches"] = targets[targets >= 0]
    outside = {name: ids[(ids < 0) | (ids >= case.vocab_size)] for name, ids in places.items()}
    bad = {name: ids for name, ids in outside.items() if ids.size}
    if not bad:
        return None
    counts = {name: int(ids.size) for name, ids in bad.items()}
    values = np.unique(np.concatenate([ids.astype(np.int64) for ids in bad.values()]))
    return {
        "measured": [int(values[0]), int(values[-1])],
        "expected": [0, case.vocab_size - 1],
        "why": f"{' and '.join(f'{n} ids of {name}' for name, n in counts.items())} are outside the vocabulary of "
        f"{case.vocab_size}: from {values[0]} to {values[-1]}",
        "remedy": "make the model's vocab_size one more than the tokenizer's highest id, and pad with an id it has",
        "evidence": {"counts": counts, "ids": values[:10].tolist()},
    }


@check("validation-in-training", "train_ids", "val_ids", explains=("overfitted",))
def validation_in_training(case: Case) -> Found:
    """The validation text is also in the training text, so its loss says nothing about new text.

    Measured is the share of n-grams of the validation ids that occur in the training ids. It is compared with what any
    two texts of this kind have in common: the share of n-grams of one part of the training ids that occur in the rest.
    n is doubled from 16 until the latter is below 0.1 (at most to 1024 or a quarter of the text). A fault above 0.2
    and three times the latter. Otherwise three or more rows of the batches that occur in the validation ids and not in
    the training ids are a fault.
    """
    train, val = case.once(train_ids), case.once(val_ids)[:50_000]
    n, longest = 16, power_below(min(1024, len(val) / 4, len(train) / 8))
    if longest < n:
        raise NotApplicable("val_ids of 64 tokens, and train_ids of 128")
    while (share := float(occurs(grams(val, n), train, n).mean())) > 0.2:
        common = common_share(train, min(len(val), len(train) // 4), n)
        if common <= 0.1 or n == longest:
            break
        n *= 2
    if share <= 0.2 or share <= (3 * common if common <= 0.1 else common + 0.3):
        return rows_of_validation(case, train, val)
    return {
        "measured": share,
        "expected": common,
        "why": f"{share:.0%} of the validation text's sequences of {n} tokens are in the training text; two parts of "
        f"the training text have {common:.1%} in common",
        "remedy": "split the text once, by document or place, before windows are cut, and keep the parts apart",
        "evidence": {"n": n, "tokens": len(val)},
    }


def rows_of_validation(case: Case, train: np.ndarray, val: np.ndarray) -> Found:
    """Look for rows of the batches that occur in the validation ids and not in the training ids."""
    if not case.has("batches") or len(train) == MOST_IDS:
        return None
    rows = [row for x, _ in case.once(batches) for row in x]
    n = power_below(min(len(row) for row in rows))
    if n < 16:
        return None
    starts = np.concatenate([grams(row[:n], n) for row in rows])
    n_val = int((occurs(starts, val, n) & ~occurs(starts, train, n)).sum())
    if n_val < 3:
        return None
    return {
        "measured": n_val,
        "expected": 0,
        "why": f"{n_val} of {len(rows)} rows of the batches are in the validation text, and not in the training text",
        "remedy": "draw the batches of training from the training ids only",
        "evidence": {"n": n, "rows": len(rows)},
    }


def common_share(ids: np.ndarray, size: int, n: int) -> float:
    """Return the share of n-grams of a part of the text that occur in the rest of it: the median of three parts."""
    shares = []
    for start in (0, (len(ids) - size) // 2, len(ids) - size):
        piece = grams(ids[start : start + size], n)
        before, after = occurs(piece, ids[:start], n), occurs(piece, ids[start + size :], n)
        shares.append(float((before | after).mean()))
    return float(np.median(shares))


@check("corpus-repeats", "train_ids", explains=("validation-in-training", "overfitted"))
def corpus_repeats(case: Case) -> Found:
    """A large part of the training text occurs twice, as after reading a file several times.

    Measured is the share of n-grams that have occurred before, where n is the largest power of two up to 512 and an
    eighth of the text. A fault above 0.25: a text that occurs twice has 0.43 to 0.5, one of which half occurs twice has
    a third.
    """
    ids = case.once(train_ids)
    n = power_below(min(512, len(ids) / 8))
    if n < 16:
        raise NotApplicable("train_ids of 128 tokens")
    hashes = grams(ids, n)
    if len(hashes) > 1_000_000:
        hashes = hashes[hashes % 16 == 0]  # a sample in which repetitions stay together
    hashes = np.sort(hashes)
    share = float((hashes[1:] == hashes[:-1]).mean())
    if share <= 0.25:
        return None
    return {
        "measured": share,
        "expected": 0,
        "why": f"{share:.0%} of the training text's sequences of {n} tokens have occurred in it before",
        "remedy": "remove the duplicates: look for a file that is read twice, or an overlap between pieces",
        "evidence": {"n": n, "tokens": len(ids), "examined_up_to": MOST_IDS},
    }


@check("corpus-too-small", "train_ids")
def corpus_too_small(case: Case) -> Found:
    """The training text is too small for the model, which will memorise it.

    A warning below ten windows of the context, or 0.02 tokens per parameter: with so few it takes a thousand epochs to
    see the 20 tokens per parameter of Hoffmann et al. 2022, and after about 40 epochs repeated data is of no use
    (Muennighoff et al. 2023). A model of 10.7M parameters trained on the 1M characters of tiny Shakespeare has 0.1.
    """
    n = len(case.once(train_ids))
    fewest, what = 10 * case.n_positions, "ten windows of the context"
    if case.has("parameters"):
        size = sum(array.size for array in case.arrays("parameters").values())
        if size // 50 > fewest:
            fewest, what = size // 50, f"0.02 tokens for each of {size:,} parameters"
    if n >= fewest:
        return None
    return {
        "measured": n,
        "expected": fewest,
        "why": f"the training text has {n:,} tokens, less than {what}",
        "remedy": "use more text, a smaller model, or a pretrained one that is only fine-tuned",
        "evidence": {},
    }
