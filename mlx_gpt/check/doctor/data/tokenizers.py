"""Targets and data: a tokenizer that does not fit the model, differs from training's, or loses the text."""

from __future__ import annotations

from contextlib import suppress
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.alignment import aligned_as_encoded, same_frequencies
from mlx_gpt.check.doctor.data.evidence import decoded, encoded, pieces, rare_pieces, text_of, train_ids, val_ids

FEWEST = 500  # validation ids whose frequencies are compared


@check(
    "vocabulary-mismatch", "encode|encode_training|decode|end_of_text", explains=("ids-outside-vocabulary", "raises")
)
def vocabulary_mismatch(case: Case) -> Found:
    """Tokenizer and model have vocabularies of different sizes: ids without an embedding, or logits without a token.

    Exact if the text is encoded to ids that the model does not have. Otherwise up to 256 of the model's ids are decoded
    one by one: a fault if for a quarter of them, and by this share for more than 128 of all ids, ``decode`` raises
    (vocabularies that are rounded up have at most 127 such ids, or 2 %).
    """
    end = case.given.get("end_of_text")
    highest = -1 if end is None else int(end)
    for name in ("encode", "encode_training"):
        try:
            if case.has(name):
                texts = [*sorted(case.once(pieces), key=len)[:8], *rare_pieces(case)]
                highest = max([highest, *(max(encoded(case, text, name), default=-1) for text in texts)])
        except NotApplicable:
            continue
    if highest >= case.vocab_size:
        return mismatch(case, highest + 1, f"the tokenizer gives id {highest}, and the model has {case.vocab_size} ids")
    unknown = unknown_ids(case) if case.has("decode") else 0
    if unknown <= max(128, case.vocab_size / 4):
        return None
    known = case.vocab_size - unknown
    return mismatch(case, known, f"of the model's {case.vocab_size} ids about {unknown} have no token: decode fails")


def mismatch(case: Case, size: int, why: str) -> Found:
    return {
        "measured": size,
        "expected": case.vocab_size,
        "why": why,
        "remedy": "make the model with the tokenizer's vocab_size, and use the tokenizer that it was trained with",
        "evidence": {"vocab_size_of_model": case.vocab_size},
    }


def unknown_ids(case: Case) -> int:
    """Estimate for how many of the model's ids ``decode`` raises, apart from parts of characters."""
    sample = np.unique(np.linspace(0, case.vocab_size - 1, 256).astype(int))
    unknown = 0
    for value in sample:
        try:
            case.call("decode", [int(value)])
        except CallFailed as failure:
            if failure.code == "raises" and isinstance(failure.__cause__, UnicodeError):
                continue
            unknown += 1
    return 0 if unknown == len(sample) else round(unknown / len(sample) * case.vocab_size)


@check("tokenizers-differ", "train_ids|encode_training", explained_by=("tokenizer-not-invertible",))
def tokenizers_differ(case: Case) -> Found:
    """Prompts are encoded in another way than the training text was, so the model reads what it has never seen.

    With ``encode_training`` exact, on pieces of the training text. Otherwise the pieces, encoded, are searched for in
    the training ids: a fault if none is found, or if in those that are found 1 % of the ids and three places differ;
    ids that only one side has, such as separators of documents, are passed over (healthy: 0). If ``decode`` gives back
    what training encoded, ``encode`` alone is wrong: this explains ``tokenizer-not-invertible`` beside it where
    ``encode_training`` is given, and else is its consequence.

    The validation ids may have another vocabulary too: see ``of_validation``.
    """
    if case.has("train_ids", "val_ids") and (finding := of_validation(case)):
        return finding
    for name in ("train_text", "encode"):
        if not case.has(name):
            raise NotApplicable(name)
    if case.has("encode_training"):
        return encoders_differ(case)
    alignment = case.once(aligned_as_encoded)
    if not alignment.pieces:
        raise NotApplicable("a longer train_text")
    if alignment.located and (alignment.share_replaced < 0.01 or alignment.spots < 3):
        return None
    if alignment.located:
        share = f"{alignment.share_replaced:.1%} of the ids"
        why = f"{share} of the training text are others in train_ids, in {alignment.spots} places"
    else:
        why = f"none of {alignment.pieces} pieces of the training text, encoded, is in train_ids"
        if case.once(same_frequencies):
            why += ", though each id is as frequent there as in the text: the ids stand in another order"
            return different(case, why, 1.0, alignment.example) | {"remedy": "shuffle rows of batches, not ids"}
    return different(case, why, alignment.share_replaced if alignment.located else 1.0, alignment.example)


def of_validation(case: Case) -> Found:
    """Return the finding if the validation ids are those of another vocabulary than the training ids.

    A fault if a unigram model of the training ids is worse on the validation ids than one that gives all ids the same
    probability, by 0.2 nats (other texts of the same vocabulary, in bytes or characters: better by 0.48 and more;
    permuted ids: worse by 0.5 and more). Half of the validation ids must occur in training, which needs ten of each.
    """
    train, val = case.once(train_ids), case.once(val_ids)
    if min(train.min(), val.min()) < 0 or max(train.max(), val.max()) >= case.vocab_size:
        return None
    counts, its = (np.bincount(ids, minlength=case.vocab_size) for ids in (train, val))
    used = int(((counts + its) > 0).sum())
    if len(val) < FEWEST or len(train) < 10 * used or its[counts > 0].sum() < len(val) / 2:
        return None
    surprise = float((its * -np.log((counts + 1) / (len(train) + used))).sum() / len(val))
    uniform = float(np.log(used))
    if surprise <= uniform + 0.2:
        return None
    common, rare = int(counts.argmax()), int(its.argmax())
    why = (
        f"by the frequencies of the training ids, val_ids have {surprise:.3g} nats, more than if all ids were alike, "
        f"{uniform:.3g}: another vocabulary; the most frequent id is {rare} in val_ids and {common} in train_ids"
    )
    return {
        "measured": surprise,
        "expected": f"below {uniform:.3g}",
        "why": why,
        "remedy": "build the vocabulary once, of the whole text, and encode both parts with it",
        "evidence": {"most_frequent_in_train": common, "most_frequent_in_val": rare},
        "explains": ("undertrained", "overfitted", "as-good-as-its-loss", "reported-loss-differs"),
    }


def encoders_differ(case: Case) -> Found:
    """Compare ``encode`` and ``encode_training`` on pieces of the text, without the ids that they add to any text."""
    differing, total, example = 0, 0, None
    for text in [*sorted(case.once(pieces), key=len)[:12], *rare_pieces(case)]:
        generated, trained = (bare(case, encoded(case, text, name), name) for name in ("encode", "encode_training"))
        total += 1
        if generated != trained:
            differing += 1
            example = example or (text[:40], generated[:8], trained[:8])
    if not differing or example is None:
        return None
    why = f"{differing} of {total} pieces of the training text have other ids by encode than by encode_training"
    difference = different(case, f"{why}, such as {example[0]!r}", differing / total, example)
    if difference["separate"]:
        return difference
    return {**difference, "separate": True, "explains": ("tokenizer-not-invertible",)}


def different(case: Case, why: str, share: float, example: Any) -> dict[str, Any]:
    return {
        "measured": share,
        "expected": 0,
        "why": why,
        "remedy": "save the tokenizer with the model, and encode prompts with the same one, cased and spaced alike",
        "evidence": {"example": example},
        "separate": not decodes_training(case),  # from "tokenizer-not-invertible"
    }


def decodes_training(case: Case) -> bool:
    """Return True if ``decode`` gives back what training encoded."""
    if not case.has("decode"):
        return True
    try:
        if case.has("encode_training"):
            piece = min(case.once(pieces), key=len)
            return piece.strip() in decoded(case, encoded(case, piece, "encode_training"))
        return decoded(case, case.once(train_ids)[:24])[4:20] in case.once(text_of)
    except CallFailed:
        return False


def bare(case: Case, ids: list[int], name: str = "encode") -> list[int]:
    """Return ids without the tokens that begin and end every text: those that the encoder gives for an empty one."""
    try:
        added = set(encoded(case, "", name))
    except CallFailed:
        added = set()
    return [value for value in ids if value not in added]


@check("tokenizer-not-invertible", "encode", "decode")
def tokenizer_not_invertible(case: Case) -> Found:
    """Encoding a text and decoding the ids gives another text, so what you read is not what the model predicted.

    A fault if a piece of the training text comes back as another text. A tokenizer may lose case, white space or rare
    characters: no fault if the decoded text has the same ids again, most of the letters (ratio of difflib above 0.5),
    and lacks only characters that ``decode`` gives for no id.
    """
    unknown = unknown_tokens(case)
    tried = 0
    for text in [*sorted(case.once(pieces), key=len)[:12], *rare_pieces(case)]:
        ids = bare(case, encoded(case, text))
        if unknown & set(ids):
            continue
        tried += 1
        back = decoded(case, ids)
        lost = {*text} - {*back}
        if back != text and (
            not (alike(text, back) and same_again(case, back, ids)) or lost & case.once(characters_of_ids)
        ):
            return {
                "measured": back[:80],
                "expected": text[:80],
                "why": f"decode(encode({text[:40]!r})) is {back[:40]!r}",
                "remedy": "make decode the inverse of encode: one vocabulary, saved once; join bytes, then decode",
                "evidence": {"ids": ids[:20]},
            }
    if not tried:
        raise NotApplicable("train_text without unknown tokens")
    return None


def characters_of_ids(case: Case) -> set[str]:
    """Return the characters that ``decode`` gives for training ids, else for the vocabulary; none for byte tokens."""
    if case.has("train_ids"):
        ids = case.once(train_ids)[:20_000]
        return {*decoded(case, ids[(ids >= 0) & (ids < case.vocab_size)])}
    characters: set[str] = set()
    for i in range(min(case.vocab_size, 5000)):
        with suppress(CallFailed):
            characters |= {*decoded(case, [i])}
    return set() if "\x01" in characters else characters


def same_again(case: Case, text: str, ids: list[int]) -> bool:
    """Return True if a decoded text is encoded to the ids that it was decoded from."""
    try:
        return bare(case, encoded(case, text)) == ids
    except CallFailed:
        return False


def unknown_tokens(case: Case) -> set[int]:
    """Return the ids of unknown text: those of two characters of private use, if they are the same."""
    try:
        first, second = (bare(case, encoded(case, character)) for character in ("\ue000", "\uf123"))
    except CallFailed:
        return set()
    return set(first) if first == second else set()


def alike(first: str, second: str) -> bool:
    """Return True if two texts have most letters in common, in order, apart from case and white space."""
    first, second = ("".join(text[:300].casefold().split()) for text in (first, second))
    return first == second or SequenceMatcher(None, first, second, autojunk=False).ratio() > 0.5
