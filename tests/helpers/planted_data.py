"""Planted faults of targets, corpus and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from .planted import BATCH, EOT, Base, Given, Planted

Batches = Iterator[tuple[np.ndarray, np.ndarray]]
Change = Callable[[np.ndarray], np.ndarray]


# Batches ------------------------------------------------------------------------------------------------------------


def fed(draw: Callable[[Base, int], Batches]) -> Callable[[Base], Given]:
    """Plant batches, with which a trained model was trained."""
    return lambda base: replace(base, draw=draw).arguments()


def not_shifted(base: Base, seed: int) -> Batches:
    return base.windows(shift=0, seed=seed)


def token_before(base: Base, seed: int) -> Batches:
    return base.windows(shift=-1, seed=seed)


def shifted_twice(base: Base, seed: int) -> Batches:
    return base.windows(shift=2, seed=seed)


def unrelated(base: Base, seed: int) -> Batches:
    """Inputs and targets are drawn apart."""
    inputs, targets = base.windows(seed=seed), base.windows(seed=seed + 1)
    while True:
        yield next(inputs)[0], next(targets)[1]


def seeded_in_each_step(base: Base, seed: int) -> Batches:
    while True:
        yield next(base.windows(seed=seed))


def three_batches(base: Base, seed: int) -> Batches:
    """The number of batches was mistaken for the number of tokens."""
    draw = base.windows(seed=seed)
    few = [next(draw) for _ in range(3)]
    while True:
        yield from few


def one_row_repeated(base: Base, seed: int) -> Batches:
    for x, y in base.windows(B=1, seed=seed):
        yield x.repeat(BATCH, 0), y.repeat(BATCH, 0)


def ends_ignored(base: Base, seed: int) -> Batches:
    """The end of a text has the id of the padding, which the loss leaves out."""
    end = end_of(base)
    for x, y in base.windows(seed=seed):
        yield x, np.where(y == end, -100, y)


def of_everything(base: Base, seed: int) -> Batches:
    return base.windows(seed=seed, ids=np.concatenate([base.val_ids, base.train_ids[: 2 * len(base.val_ids)]]))


def twice_shifted(base: Base) -> Given:
    """Batches are shifted, and so is the loss."""
    loss = base.arguments()["loss"]
    pad = np.full((1, 1), -100)

    def shifting(x: np.ndarray, y: np.ndarray) -> float:
        return loss(x, np.concatenate([np.asarray(y)[:, 1:], pad.repeat(len(y), 0)], axis=1))

    return {**base.arguments(gradient=None, step=None, new_step=None), "loss": shifting}


# Corpora ------------------------------------------------------------------------------------------------------------


def misread(encoding: str) -> Callable[[str], str]:
    return lambda text: accented(text).encode().decode(encoding, "replace")


def accented(text: str) -> str:
    """Return the text as a Frenchman might write it."""
    for plain, accent in (("he", "hé"), ("a ", "à "), ("oo", "öö"), ("su", "sü"), ('"', "”")):
        text = text.replace(plain, accent)
    return text


def as_utf_16(text: str) -> str:
    return text.encode("utf-16-le").decode("latin-1")


MISREAD = {name: misread(name) for name in ("cp1252", "ascii", "mac-roman")}  # one object each: they are cached by it


def of_text(change: Callable[[str], str]) -> Callable[[Base], Given]:
    return lambda base: replace(base, change_text=change).arguments()


def three_times(text: str) -> str:
    end = EOT if EOT in text else "\n"
    return (text[: text.rfind(end, 0, len(text) // 3)] + end) * 3


def read_twice(base: Base) -> Given:
    return base.arguments(train_ids=np.concatenate([base.train_ids] * 2), train_text=2 * base.decode(base.train_ids))


def without_ends(base: Base) -> Given:
    return replace(base, change_ids=without(end_of(base))).arguments(end_of_text=end_of(base))


@cache
def without(i: int) -> Change:
    return lambda ids: ids[ids != i]


def end_of(base: Base) -> int:
    """Return the id that ends a story: a line's end for characters."""
    return base.encode(EOT if base.size == 2 else "\n")[0]


def validation_from_training(base: Base) -> Given:
    ids = base.train_ids
    val_ids = ids[len(ids) // 3 : len(ids) // 3 + len(ids) // 9]
    return base.arguments(val_ids=val_ids, val_loss=base.mean_loss(val_ids))


def trained_on_everything(base: Base) -> Given:
    ids = np.concatenate([base.train_ids, base.val_ids])
    return base.arguments(train_ids=ids, train_text=base.decode(ids))


@cache
def small(end: int) -> Change:
    """Return a function that keeps 100 ids, with an end of a text where there is one."""

    def cut(ids: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(ids == end)
        start = max(int(ends[0]) - 50, 0) if len(ends) else 0
        return ids[start : start + 100]

    return cut


# Ids and tokenizers -------------------------------------------------------------------------------------------------


def wrapped(kind: str) -> Callable[[Base], Given]:
    """Store ids in a type that is too small for them; smaller vocabularies get higher ids."""

    def plant(base: Base) -> Given:
        move = max(0, int(np.iinfo(kind).max) + 1 - base.config.vocab_size // 2)
        base = base.with_faults(vocab_size=base.config.vocab_size + move)
        return replace(base, change_ids=stored_as(kind, move)).arguments(
            encode=lambda text: [i + move for i in base.encode(text)],
            decode=lambda ids: base.decode([max(int(i) - move, 0) for i in ids]),
            train_text=base.decode(base.train_ids),
            end_of_text=None,
        )

    return plant


@cache
def stored_as(kind: str, move: int) -> Change:
    return lambda ids: (ids.astype(np.int64) + move).astype(kind)


def one_id_outside(base: Base) -> Given:
    ids = base.train_ids.astype(np.int64)
    ids[len(ids) // 2] = base.config.vocab_size
    return base.arguments(train_ids=ids, train_text=None)


def padding_outside(base: Base) -> Given:
    """The padding has the id after the last, also in the targets."""

    def batches() -> Batches:
        for x, y in base.windows():
            x, y = x.copy(), y.copy()
            x[:3, -4:] = y[:3, -4:] = base.config.vocab_size
            yield x, y

    return base.arguments(batches=batches)


def vocabulary_too_small(base: Base) -> Given:
    """The model has fewer rows than the tokenizer has tokens; the last is left out of the batches."""
    V = base.config.vocab_size - 1
    small = replace(base.with_faults(vocab_size=V), change_ids=without(V))
    ids = {"train_ids": base.train_ids, "val_ids": base.val_ids}
    return small.arguments(**ids, train_text=base.decode(base.train_ids))


def vocabulary_of_another(base: Base) -> Given:
    """The model was made for another tokenizer, of ten times as many tokens."""
    return base.with_faults(vocab_size=10 * base.config.vocab_size).arguments()


def tokenizer(**changes: Callable[[Base], Any]) -> Callable[[Base], Given]:
    return lambda base: base.arguments(**{name: change(base) for name, change in changes.items()})


def backwards(base: Base, ids: Any) -> list[int]:
    return [len(base.vocabulary) - 1 - int(i) for i in ids]


def validation_in_another_order(base: Base) -> Given:
    """The vocabulary was a set, which has another order in the process that encoded the validation text."""
    order = np.random.default_rng(base.seed).permutation(len(base.vocabulary))
    return base.arguments(val_ids=order[base.val_ids], val_loss=None)


def ids_shuffled(base: Base) -> Given:
    """The ids were shuffled in place of the rows of the batches."""
    text = base.decode(base.train_ids)
    return replace(base, change_ids=np.random.default_rng(base.seed).permutation).arguments(
        train_text=text, end_of_text=None, val_loss=None
    )


def trained_on_lower_case(base: Base) -> Given:
    return replace(base, change_ids=lowered(base)).arguments(train_text=base.decode(base.train_ids))


@cache
def lowered(base: Base) -> Change:
    return lambda ids: np.array(base.encode(base.decode(ids).lower()), np.int32)


FAULTS = {
    "x as targets": Planted("targets-not-shifted", fed(not_shifted)),
    "the token before": Planted("targets-not-shifted", fed(token_before)),
    "unrelated targets": Planted("targets-not-shifted", fed(unrelated)),
    "shifted by two": Planted("targets-shifted-twice", fed(shifted_twice)),
    "shifted by data and loss": Planted("targets-shifted-twice", twice_shifted, states=(False,)),
    "seeded in each step": Planted("same-batch-again", fed(seeded_in_each_step)),
    "three batches only": Planted("same-batch-again", fed(three_batches)),
    "one row in a batch": Planted("same-batch-again", fed(one_row_repeated)),
    "validation from training": Planted("validation-in-training", validation_from_training),
    "batches of everything": Planted("validation-in-training", fed(of_everything)),
    "trained on everything": Planted("validation-in-training", trained_on_everything),
    "uint8": Planted("ids-wrapped", wrapped("uint8")),
    "int8": Planted("ids-wrapped", wrapped("int8")),
    "an id outside": Planted("ids-outside-vocabulary", one_id_outside),
    "padding outside": Planted("ids-outside-vocabulary", padding_outside),
    "vocabulary too small": Planted("vocabulary-mismatch", vocabulary_too_small, sizes=(0, 1)),  # where it occurs
    "vocabulary of another": Planted("vocabulary-mismatch", vocabulary_of_another),
    "decodes one off": Planted(
        "tokenizer-not-invertible",
        tokenizer(decode=lambda base: lambda ids: base.decode([(int(i) + 1) % len(base.vocabulary) for i in ids])),
    ),
    "decodes with spaces": Planted(
        "tokenizer-not-invertible",
        tokenizer(decode=lambda base: lambda ids: " ".join(base.decode([i]) for i in ids)),
    ),
    "loses a letter": Planted(
        "tokenizer-not-invertible",
        tokenizer(decode=lambda base: lambda ids: base.decode(ids).replace("w", "")),
    ),
    "alphabet in another order": Planted(
        "tokenizers-differ",
        tokenizer(
            encode=lambda base: lambda text: backwards(base, base.encode(text)),
            decode=lambda base: lambda ids: base.decode(backwards(base, ids)),
            end_of_text=lambda base: None,
        ),
    ),
    "validation in another vocabulary": Planted("tokenizers-differ", validation_in_another_order),
    "ids shuffled": Planted("tokenizers-differ", ids_shuffled),
    "trained on lower case": Planted("tokenizers-differ", trained_on_lower_case, sizes=(1, 2)),
    "generates in lower case": Planted(
        "tokenizers-differ",
        lambda base: base.arguments(encode=lambda text: base.encode(text.lower()), encode_training=base.encode),
        sizes=(1, 2),
    ),
    "UTF-8 read as Windows-1252": Planted("mis-decoded-text", of_text(MISREAD["cp1252"])),
    "UTF-8 read as ASCII": Planted("mis-decoded-text", of_text(MISREAD["ascii"])),
    "UTF-8 read as Mac Roman": Planted("mis-decoded-text", of_text(MISREAD["mac-roman"])),
    "UTF-16 read as bytes": Planted("mis-decoded-text", of_text(as_utf_16), sizes=(0, 1)),
    "no ends": Planted("end-of-text-never-learned", without_ends),
    "ends ignored": Planted(
        "end-of-text-never-learned",
        lambda base: replace(base, draw=ends_ignored).arguments(end_of_text=end_of(base)),
    ),
    "read twice": Planted("corpus-repeats", read_twice),
    "the text three times": Planted("corpus-repeats", of_text(three_times)),
    "a small corpus": Planted(
        "corpus-too-small", lambda base: replace(base, change_ids=small(end_of(base))).arguments()
    ),
}
