"""The doctor's checks of targets, corpus and tokenizer name each planted fault by its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.fed_data import (
    EOT,
    Given,
    bpe,
    characters,
    codes,
    examined,
    fed,
    prose,
    random_windows,
    tinyworld,
    with_ids,
)

from mlx_gpt.check.doctor import Report


def stories_or_prose(size: int, seed: int) -> Given:
    """A corpus with documents, by BPE (odd seeds), or of one text, by characters."""
    return with_ids(bpe(tinyworld(size, seed), 280) if seed % 2 else characters(prose(size, seed)))


def unrelated_targets(given: Given) -> Given:
    inputs, targets = (random_windows(np.asarray(given["train_ids"]).astype(int), seed=seed)() for seed in (1, 2))
    return {**given, "batches": lambda: ((next(inputs)[0], next(targets)[1]) for _ in range(40))}


def seeded_each_step(given: Given, B: int = 8) -> Given:
    draw = fed(given, B=B)["batches"]
    return {**given, "batches": lambda: (next(draw()) for _ in range(40))}


def three_batches_only(given: Given) -> Given:
    draw = fed(given)["batches"]
    return {**given, "batches": lambda: (next(row) for _ in range(13) for row in [draw()] for _ in range(3))}


def one_row_repeated(given: Given) -> Given:
    draw = fed(given, B=1)["batches"]
    return {**given, "batches": lambda: ((x.repeat(8, 0), y.repeat(8, 0)) for x, y in draw())}


def validation_of_training(given: Given) -> Given:
    ids = np.asarray(given["train_ids"])
    return {**given, "val_ids": ids[len(ids) // 3 : len(ids) // 3 + len(ids) // 9]}


def trained_on_everything(given: Given) -> Given:
    whole = np.concatenate([given["train_ids"], given["val_ids"]])
    return {**given, "train_ids": whole}


def batches_of_everything(given: Given) -> Given:
    return {**given, "batches": trained_on_everything_batches(given)}


def trained_on_everything_batches(given: Given) -> Callable[[], Any]:
    return random_windows(np.concatenate([given["val_ids"], given["train_ids"][:200]]).astype(int))


def twice(given: Given) -> Given:
    return {**given, "train_ids": np.concatenate([given["train_ids"]] * 2)}


def half_again(given: Given) -> Given:
    ids = np.asarray(given["train_ids"])
    return {**given, "train_ids": np.concatenate([ids, ids[: len(ids) // 2]])}


def stored_as(kind: str) -> Callable[[Given], Given]:
    def wrapped(given: Given) -> Given:
        ids = np.asarray(given["train_ids"]).astype(np.int64)
        if given["vocab_size"] <= 256:  # the ids of a larger vocabulary
            return stored(with_gap(given))
        return stored({**given, "train_ids": ids})

    def with_gap(given: Given) -> Given:
        move = lambda ids: [i + 240 for i in ids]  # noqa: E731
        back = lambda ids: given["decode"]([max(i - 240, 0) for i in ids])  # noqa: E731
        encode = lambda text: move(given["encode"](text))  # noqa: E731
        ids = np.asarray(given["train_ids"]).astype(np.int64) + 240
        return {**given, "encode": encode, "decode": back, "train_ids": ids, "vocab_size": given["vocab_size"] + 240}

    def stored(given: Given) -> Given:
        ids = given["train_ids"].astype(kind)
        val = np.asarray(given["val_ids"]).astype(np.int64).astype(kind)
        given = {**given, "train_ids": ids, "val_ids": val}
        return fed(given)

    return wrapped


def ids_too_high(given: Given) -> Given:
    ids = np.asarray(given["train_ids"]).astype(np.int64)
    ids[len(ids) // 2] = given["vocab_size"]
    return {**given, "train_ids": ids}


def vocabulary_too_small(given: Given) -> Given:
    return {**given, "vocab_size": given["vocab_size"] - 1}


def vocabulary_of_gpt2(given: Given) -> Given:
    return {**given, "vocab_size": 50257}


def decodes_one_off(given: Given) -> Given:
    decode, V = given["decode"], given["vocab_size"]
    return {**given, "decode": lambda ids: decode([(i + 1) % V for i in ids])}


def decodes_with_spaces(given: Given) -> Given:
    decode = given["decode"]
    return {**given, "decode": lambda ids: " ".join(decode([i]) for i in ids)}


def loses_a_letter(given: Given) -> Given:
    decode = given["decode"]
    return {**given, "decode": lambda ids: decode(ids).replace("w", "")}


def joins_lines(given: Given) -> Given:
    given = with_ids(characters(given["train_text"].replace(". ", ".\n\n")))
    encode = given["encode"]
    return {**given, "encode": lambda text: encode(" ".join(text.split()))}


def without_ids(given: Given) -> Given:
    return {name: given[name] for name in ("encode", "decode", "vocab_size", "train_text")}


def loses_capitals(given: Given) -> Given:
    encode = given["encode"]
    return {**given, "encode": lambda text: encode(text.lower())}


def other_order(given: Given) -> Given:
    """The same tokens numbered backwards: encode and decode agree with each other, not with training."""
    encode, decode, last = given["encode"], given["decode"], given["vocab_size"] - 1
    return {
        **given,
        "encode": lambda text: [last - i for i in encode(text)],
        "decode": lambda ids: decode([last - i for i in ids]),
    }


def encodes_backwards(given: Given) -> Given:
    encode = given["encode"]
    return {**given, "encode": lambda text: encode(text[::-1])}


def trained_on_lower_case(given: Given) -> Given:
    documents = [given["encode"](document.lower()) for document in given["train_text"].split(EOT)]
    ids = [
        i for document in documents for i in [*document, *([given["end_of_text"]] if "end_of_text" in given else [])]
    ]
    return fed({**given, "train_ids": np.array(ids), "val_ids": None})


def generates_in_lower_case(given: Given) -> Given:
    encode = given["encode"]
    return {**given, "encode": lambda text: encode(text.lower()), "encode_training": encode, "decode": None}


def read_as(encoding: str) -> Callable[[Given], Given]:
    def misread(given: Given) -> Given:
        return with_ids(characters(prose(len(given["train_text"]), accents=True).encode().decode(encoding, "replace")))

    return misread


def read_as_utf_16(given: Given) -> Given:
    return with_ids(characters(given["train_text"].encode("utf-16-le").decode("latin-1")))


def without_ends(given: Given) -> Given:
    ids = np.asarray(given["train_ids"])
    end = given.get("end_of_text", given["vocab_size"] - 1)
    parts = {name: np.asarray(given[name])[np.asarray(given[name]) != end] for name in ("train_ids", "val_ids")}
    return fed({**given, "end_of_text": end, **parts}) if len(ids) else given


def ends_ignored(given: Given) -> Given:
    end = given.get("end_of_text", 0)
    draw = given["batches"]
    return {**given, "end_of_text": end, "batches": lambda: ((x, np.where(y == end, -100, y)) for x, y in draw())}


PLANTED: dict[str, tuple[str, Callable[[Given], Given]]] = {
    "x as targets": ("targets-not-shifted", lambda given: fed(given, shift=0)),
    "the token before": ("targets-not-shifted", lambda given: fed(given, shift=-1)),
    "unrelated targets": ("targets-not-shifted", unrelated_targets),
    "shifted by two": ("targets-shifted-twice", lambda given: fed(given, shift=2)),
    "seeded in each step": ("same-batch-again", seeded_each_step),
    "three batches only": ("same-batch-again", three_batches_only),
    "one row in a batch": ("same-batch-again", one_row_repeated),
    "seeded, one row": ("same-batch-again", lambda given: seeded_each_step(given, B=1)),
    "validation from training": ("validation-in-training", validation_of_training),
    "trained on everything": ("validation-in-training", trained_on_everything),
    "batches of everything": ("validation-in-training", batches_of_everything),
    "read twice": ("corpus-repeats", twice),
    "half of it read again": ("corpus-repeats", half_again),
    "uint8": ("ids-wrapped", stored_as("uint8")),
    "int8": ("ids-wrapped", stored_as("int8")),
    "id too high": ("ids-outside-vocabulary", ids_too_high),
    "vocabulary too small": ("vocabulary-mismatch", vocabulary_too_small),
    "vocabulary of GPT-2": ("vocabulary-mismatch", vocabulary_of_gpt2),
    "decodes one off": ("tokenizer-not-invertible", decodes_one_off),
    "decodes with spaces": ("tokenizer-not-invertible", decodes_with_spaces),
    "loses a letter": ("tokenizer-not-invertible", loses_a_letter),
    "joins lines": ("tokenizer-not-invertible", joins_lines),
    "joins lines, no ids": ("tokenizer-not-invertible", lambda given: without_ids(joins_lines(given))),
    "loses capitals": ("tokenizer-not-invertible", loses_capitals),
    "encodes backwards": ("tokenizer-not-invertible", encodes_backwards),
    "alphabet in another order": ("tokenizers-differ", other_order),
    "trained on lower case": ("tokenizers-differ", trained_on_lower_case),
    "generates in lower case": ("tokenizers-differ", generates_in_lower_case),
    "UTF-8 read as Windows-1252": ("mis-decoded-text", read_as("cp1252")),
    "UTF-8 read as ASCII": ("mis-decoded-text", read_as("ascii")),
    "UTF-16 read as bytes": ("mis-decoded-text", read_as_utf_16),
    "no ends": ("end-of-text-never-learned", without_ends),
    "ends ignored": ("end-of-text-never-learned", ends_ignored),
}


@pytest.mark.parametrize(("size", "seed"), [(6_000, 0), (40_000, 1)])  # characters of prose, BPE of stories
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault: str, size: int, seed: int) -> None:
    code, plant = PLANTED[fault]
    assert faults(examined(plant(stories_or_prose(size, seed)))) == [code]


def faults(report: Report) -> list[str]:
    return [finding.code for finding in report.findings if finding.severity == "fault"]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("seed", range(3))
def test_ids_that_wrap_for_a_few_rare_tokens_are_named(kind: str, seed: int) -> None:
    given = characters(prose(40_000, seed))
    limit = int(np.iinfo(kind).max)
    encode, decode, common = given["encode"], given["decode"], given["vocab_size"] - 1
    rare = encode("q")[0]  # 0.5 % of the characters have an id above the limit
    moved = {rare: limit + 3}
    given |= {
        "encode": lambda text: [moved.get(i, i) for i in encode(text)],
        "decode": lambda ids: decode([rare if i > common else i for i in ids]),
        "vocab_size": limit + 10,
    }
    given["train_ids"] = np.array(given["encode"](given["train_text"])).astype(kind)
    assert codes(examined({**given, "decode": None})) == ["ids-wrapped"]


@pytest.mark.parametrize(
    ("kind", "V", "named"),
    [
        ("int8", 129, ["ids-wrapped"]),
        ("int8", 128, []),
        ("uint8", 257, ["ids-wrapped"]),
        ("uint8", 256, []),
        ("int16", 40_000, ["ids-wrapped"]),
        ("uint16", 65_537, ["ids-wrapped"]),
        ("uint16", 50_257, []),
    ],
)
def test_a_type_that_does_not_hold_the_vocabulary_wraps_ids(kind: str, V: int, named: list[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 100, 5000).astype(kind)
    assert codes(examined({"vocab_size": V, "train_ids": ids})) == named


def test_batches_that_wrap_are_named() -> None:
    given = with_ids(bpe(tinyworld(40_000), 400))
    draw = given["batches"]
    given["batches"] = lambda: ((x.astype(np.uint8), y) for x, y in draw())
    assert "ids-wrapped" in codes(examined(given))
