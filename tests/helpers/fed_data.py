"""Texts, tokenizers and batches as people write and feed them, examined by the checks of data alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.check.doctor import Report
from mlx_gpt.check.doctor.arguments import ids_of
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import run_checks
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld.stories import generate_stories

MODULES = ("corpus", "targets", "texts", "tokenizers")
DATA_CHECKS = [check for check in CHECKS if check.find.__module__.rpartition(".")[2] in MODULES]
EOT = "<|endoftext|>"
Given = dict[str, Any]


def examined(given: Given) -> Report:
    given = {"n_positions": 32, **given}
    given |= {name: ids_of(name, given[name]) for name in ("train_ids", "val_ids") if given.get(name) is not None}
    vocab_size, n_positions = given.pop("vocab_size"), given.pop("n_positions")
    return run_checks(Case(given, vocab_size, n_positions, minutes=1.0), DATA_CHECKS)


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


# Texts ------------------------------------------------------------------------------------------------------------


@cache
def prose(size: int, seed: int = 0, accents: bool = False) -> str:
    """Sentences of random words by Zipf's law, with capitals, punctuation and quotation marks."""
    rng = np.random.default_rng(seed)
    letters = list("etaoinshrdlucmfwypvbgkjqxz" + ("éèàöüßñç" * 2 if accents else ""))
    weights = 1 / np.arange(2, 2 + len(letters))
    words = ["".join(rng.choice(letters, rng.integers(2, 9), p=weights / weights.sum())) for _ in range(2000)]
    zipf = 1 / np.arange(1, 2001)
    n = size // 5
    drawn = rng.choice(2000, n, p=zipf / zipf.sum())
    ends = rng.random(n)
    text, start = [], True
    for word, end in zip(drawn, ends, strict=True):
        mark = ".\n" if end < 0.03 else ". " if end < 0.1 else ", " if end < 0.2 else "’s " if end < 0.23 else " "
        text.append((words[word].capitalize() if start else words[word]) + mark)
        start = mark[0] == "."
    return "".join(text)[:size]


@cache
def tinyworld(size: int, seed: int = 0) -> str:
    """Stories with <|endoftext|> between them."""
    return EOT.join(generate_stories(size // 200 + 1, seed=seed))[:size].rsplit(EOT, 1)[0]


# Tokenizers as people write them ------------------------------------------------------------------------------------


def characters(text: str, order: Callable[[set[str]], list[str]] = sorted) -> Given:
    """Characters by their place in the sorted alphabet; others raise KeyError."""
    alphabet = order(set(text))
    to_id = {character: i for i, character in enumerate(alphabet)}
    return {
        "encode": lambda s: [to_id[character] for character in s],
        "decode": lambda ids: "".join(alphabet[i] for i in ids),
        "vocab_size": len(alphabet),
        "train_text": text,
    }


def utf8(text: str) -> Given:
    return {
        "encode": lambda s: list(s.encode()),
        "decode": lambda ids: bytes(ids).decode(),  # raises for half a character
        "vocab_size": 256,
        "train_text": text,
    }


def lower_case(text: str) -> Given:
    given = characters(text.lower())
    return {**given, "encode": lambda s: given["encode"](s.lower()), "train_text": text}


def unknown_characters(text: str) -> Given:
    """Characters that occur fewer than 20 times become one unknown token."""
    alphabet = ["<unk>", *sorted(c for c in set(text) if text.count(c) >= 20)]
    to_id = {character: i for i, character in enumerate(alphabet)}
    return {
        "encode": lambda s: [to_id.get(character, 0) for character in s],
        "decode": lambda ids: "".join(alphabet[i] for i in ids),
        "vocab_size": len(alphabet),
        "train_text": text,
    }


def words(text: str) -> Given:
    """Words and punctuation marks, joined with spaces; rare words become one unknown token."""
    split = re.compile(r"\w+|[^\w\s]").findall
    counts: dict[str, int] = {}
    for word in split(text):
        counts[word] = counts.get(word, 0) + 1
    vocabulary = ["[UNK]", *sorted(word for word, n in counts.items() if n > 2)]
    to_id = {word: i for i, word in enumerate(vocabulary)}
    return {
        "encode": lambda s: [to_id.get(word, 0) for word in split(s)],
        "decode": lambda ids: " ".join(vocabulary[i] for i in ids),
        "vocab_size": len(vocabulary),
        "train_text": text,
    }


@cache
def trained(text: str, vocab_size: int) -> Tokenizer:
    return Tokenizer.train([text], vocab_size)


def bpe(text: str, vocab_size: int = 320) -> Given:
    tokenizer = trained(text, vocab_size)
    return {
        "encode": tokenizer.encode,
        "decode": tokenizer.decode,
        "vocab_size": tokenizer.vocab_size,
        "train_text": text,
        "train_ids": np.array([*tokenizer.encode_documents(text), tokenizer.eot_id], np.uint16),
        "end_of_text": tokenizer.eot_id,
    }


def tiktoken_bpe(text: str) -> Given:
    """As ``tiktoken`` gives it: refuses special tokens in a text, and panics for ids that it does not have."""
    import tiktoken

    ours = trained(text, 320)
    encoding = tiktoken.Encoding("its", pat_str=r"\w+|\W", mergeable_ranks=ours.ranks, special_tokens=ours.specials)
    return {
        "encode": encoding.encode,
        "decode": encoding.decode,
        "vocab_size": 384,  # rounded up
        "train_text": text,
        "train_ids": np.array(encoding.encode(text, allowed_special="all"), np.int32),
    }


# Batches as people feed them ----------------------------------------------------------------------------------------


def random_windows(ids: np.ndarray, B: int = 8, T: int = 32, shift: int = 1, seed: int = 0) -> Callable[[], Any]:
    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(seed)
        while True:
            starts = rng.integers(2, len(ids) - T - 3, B)
            yield np.stack([ids[i : i + T] for i in starts]), np.stack([ids[i + shift : i + shift + T] for i in starts])

    return batches


def in_order(ids: np.ndarray, B: int = 4, T: int = 32) -> Callable[[], Any]:
    """Windows one after the other, from the beginning again when the text ends."""

    def batches() -> Iterator[tuple[mx.array, mx.array]]:
        row = 0
        rows = (len(ids) - 1) // T
        while True:
            starts = (np.arange(row, row + B) % rows) * T
            row += B
            x = np.stack([ids[i : i + T] for i in starts])
            yield mx.array(x), mx.array(np.stack([ids[i + 1 : i + T + 1] for i in starts]))

    return batches


def padded(ids: np.ndarray, pad: int, ignore: int, T: int = 32) -> Callable[[], Any]:
    """Pieces of random length, padded; targets of the padding are ignored."""

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        while True:
            x, y = np.full((4, T), pad), np.full((4, T), ignore)
            for row in range(4):
                n, i = rng.integers(4, T), rng.integers(len(ids) - T - 1)
                x[row, :n], y[row, :n] = ids[i : i + n], ids[i + 1 : i + n + 1]
            yield x, y

    return batches


def with_ids(given: Given, batches: Callable[..., Callable[[], Any]] | None = random_windows, **how: Any) -> Given:
    """Split the encoded text into training and validation ids, and add batches."""
    ids = given.get("train_ids")
    ids = np.array(given["encode"](given["train_text"])) if ids is None else ids
    n = len(ids) * 9 // 10
    added = {"train_ids": ids[:n], "val_ids": ids[n:]}
    return {**given, **added, **({"batches": batches(ids[:n].astype(int), **how)} if batches else {})}


def fed(given: Given, **how: Any) -> Given:
    return {**given, "batches": random_windows(np.asarray(given["train_ids"]).astype(int), **how)}
