"""The doctor's checks of targets, corpus and tokenizer name each planted fault, and pass data as people feed it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.plain_gpt import PlainConfig, PlainGPT

from mlx_gpt.check.doctor import Report, examine
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import run_checks
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld.stories import generate_stories

MODULES = ("corpus", "targets", "texts", "tokenizers")
DATA_CHECKS = [check for check in CHECKS if check.find.__module__.rpartition(".")[2] in MODULES]
SIZES = (6_000, 40_000, 300_000)  # characters
EOT = "<|endoftext|>"
Given = dict[str, Any]


def examined(given: Given) -> Report:
    given = {"n_positions": 32, **given}
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


HEALTHY: dict[str, Callable[[], Given]] = {
    "characters": lambda: with_ids(characters(prose(40_000))),
    "characters, tinyworld": lambda: with_ids(characters(tinyworld(40_000).replace(EOT, "\n"))),
    "two characters": lambda: with_ids(characters("".join(np.random.default_rng(0).choice(["a", "b"], 20_000)))),
    "bytes": lambda: with_ids(utf8(prose(40_000, accents=True)), in_order),
    "bytes in uint8": lambda: {**with_ids(utf8(prose(40_000))), "vocab_size": 257},
    "lower case": lambda: with_ids(lower_case(prose(40_000))),
    "unknown characters": lambda: with_ids(unknown_characters(prose(40_000))),
    "words": lambda: with_ids(words(prose(100_000))),
    "bpe, stories": lambda: with_ids(bpe(tinyworld(300_000))),
    "bpe, stories, one epoch again": lambda: with_ids(bpe(tinyworld(6_000), 280), in_order),
    "bpe, prose": lambda: with_ids(bpe(prose(300_000), 2000)),
    "tiktoken": lambda: with_ids(tiktoken_bpe(tinyworld(100_000))),
    "stories, bytes": lambda: with_ids(bpe(tinyworld(300_000), 257)),
    "padding ignored": lambda: with_ids(characters(prose(40_000)), padded, pad=0, ignore=-100),
    "padding in the vocabulary": lambda: with_ids(characters(prose(40_000)), padded, pad=0, ignore=0),
    "padding beside": lambda: {
        **with_ids(characters(prose(40_000)), padded, pad=len(set(prose(40_000))), ignore=-1),
        "vocab_size": len(set(prose(40_000))) + 1,
    },
    "the whole corpus is a batch": lambda: with_ids(characters("a poem of two lines,\nand no more in it."), None),
    "batches only": lambda: {"vocab_size": 256, "batches": with_ids(utf8(prose(40_000)))["batches"]},
    "one row": lambda: with_ids(characters(prose(40_000)), random_windows, B=1),
    "text only": lambda: {"vocab_size": 80, "train_text": prose(40_000, accents=True)},
    "tokenizer only": lambda: characters(prose(6_000)),
    "shuffled documents": lambda: shuffled(tinyworld(100_000)),
    "German quotation marks": lambda: characters("Das macht Spaß“, sagte er. „Größe und Müßiggang“ heißt es oft. "),
    "code with a header": lambda: with_ids(characters(code(60))),
}


def shuffled(text: str) -> Given:
    """Documents in another order than in the text, a tenth of them for validation, encoded one by one."""
    given = bpe(text)
    documents = text.split(EOT)
    order = np.random.default_rng(0).permutation(len(documents))
    ids = [given["end_of_text"]]
    for i in order[: len(order) * 9 // 10]:
        ids += [*given["encode"](documents[i]), given["end_of_text"]]
    return {**given, "train_ids": ids}


def code(n: int) -> str:
    """Files that begin with the same eight lines."""
    header = "".join(
        f"# line {i} of a licence that stands in every file of this project, word for word\n" for i in range(8)
    )
    return "".join(header + prose(2_000 * n)[2_000 * i : 2_000 * (i + 1)] for i in range(n))


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_data_has_no_finding(name: str) -> None:
    warnings = ["corpus-too-small"] if name == "the whole corpus is a batch" else []
    assert codes(examined(HEALTHY[name]())) == warnings


# Planted faults -----------------------------------------------------------------------------------------------------


def stories_or_prose(size: int, seed: int) -> Given:
    """A corpus with documents (even seeds) or of one text, by BPE or by characters."""
    return with_ids(bpe(tinyworld(size, seed), 280) if seed % 2 else characters(prose(size, seed)))


def fed(given: Given, **how: Any) -> Given:
    return {**given, "batches": random_windows(np.asarray(given["train_ids"]).astype(int), **how)}


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


def other_order(given: Given) -> Given:
    """The same tokens numbered backwards: encode and decode agree with each other, not with training."""
    encode, decode, last = given["encode"], given["decode"], given["vocab_size"] - 1
    return {
        **given,
        "encode": lambda text: [last - i for i in encode(text)],
        "decode": lambda ids: decode([last - i for i in ids]),
    }


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
    "uint8": ("ids-wrapped", stored_as("uint8")),
    "int8": ("ids-wrapped", stored_as("int8")),
    "id too high": ("ids-outside-vocabulary", ids_too_high),
    "vocabulary too small": ("vocabulary-mismatch", vocabulary_too_small),
    "vocabulary of GPT-2": ("vocabulary-mismatch", vocabulary_of_gpt2),
    "decodes one off": ("tokenizer-not-invertible", decodes_one_off),
    "decodes with spaces": ("tokenizer-not-invertible", decodes_with_spaces),
    "loses a letter": ("tokenizer-not-invertible", loses_a_letter),
    "alphabet in another order": ("tokenizers-differ", other_order),
    "trained on lower case": ("tokenizers-differ", trained_on_lower_case),
    "generates in lower case": ("tokenizers-differ", generates_in_lower_case),
    "UTF-8 read as Windows-1252": ("mis-decoded-text", read_as("cp1252")),
    "UTF-8 read as ASCII": ("mis-decoded-text", read_as("ascii")),
    "UTF-16 read as bytes": ("mis-decoded-text", read_as_utf_16),
    "no ends": ("end-of-text-never-learned", without_ends),
    "ends ignored": ("end-of-text-never-learned", ends_ignored),
}


@pytest.mark.parametrize(
    ("size", "seed"),
    [
        pytest.param(size, seed, marks=[pytest.mark.slow] if size == SIZES[2] or seed == (i + 1) % 3 else [])
        for i, size in enumerate(SIZES)
        for seed in range(3)
    ],
)
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


def test_batches_that_wrap_are_named() -> None:
    given = with_ids(bpe(tinyworld(40_000), 400))
    draw = given["batches"]
    given["batches"] = lambda: ((x.astype(np.uint8), y) for x, y in draw())
    assert "ids-wrapped" in codes(examined(given))


# With a model -------------------------------------------------------------------------------------------------------


def with_loss(own: int, given: Given, seed: int) -> Given:
    """A model whose loss shifts the targets by itself, by ``own``, as that of transformers does by 1."""
    model = PlainGPT(PlainConfig(vocab_size=given["vocab_size"]), seed=seed)

    def loss(x: np.ndarray, y: np.ndarray) -> mx.array:
        T = x.shape[1] - own
        return mx.mean(nn.losses.cross_entropy(model(mx.array(x))[:, :T], mx.array(y)[:, own:]))

    return {**given, "forward": lambda ids: model(mx.array(ids)), "loss": loss}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("of_data", "own", "expected"),
    [
        (1, 0, []),
        (0, 1, []),
        (1, 1, ["targets-shifted-twice"]),
        (2, 0, ["targets-shifted-twice"]),
        (0, 2, ["targets-shifted-twice"]),
        (0, 0, ["targets-not-shifted"]),
    ],
)
def test_the_shifts_of_data_and_loss_are_added(of_data: int, own: int, expected: list[str], seed: int) -> None:
    given = fed(with_ids(characters(prose(6_000, seed))), shift=of_data)
    assert codes(examined(with_loss(own, given, seed))) == expected


def test_data_of_a_healthy_model_has_no_finding_and_goes_with_the_other_checks() -> None:
    given = with_ids(bpe(tinyworld(100_000)))
    report = examine(PlainGPT(PlainConfig(vocab_size=given["vocab_size"])), **{**given, "vocab_size": None})
    assert not [finding for finding in report.findings if finding.code in {check.code for check in DATA_CHECKS}]


def fails(*_: Any) -> Any:
    raise SystemExit("no")


@pytest.mark.parametrize(
    "given",
    [
        {"batches": fails},
        {"batches": lambda: iter([])},
        {"batches": lambda: iter([(np.zeros((2, 4)), np.zeros((2, 4)))])},
        {"batches": lambda: [np.zeros((3, 4), int)] * 3},
        {"encode": fails, "train_text": "a text", "train_ids": [0, 1]},
        {"encode": lambda text: text, "train_text": "a text that is somewhat longer", "train_ids": [0, 1]},
        {"decode": fails, "train_ids": [0, 1, 2] * 100},
    ],
)
def test_functions_that_fail_are_findings(given: Given) -> None:
    assert {"raises", "wrong-shape"} & set(codes(examined({"vocab_size": 5, **given})))


@pytest.mark.parametrize(
    "given",
    [
        {"train_ids": []},
        {"train_ids": np.zeros(300, np.float32), "val_ids": [], "train_text": ""},
        {"train_ids": [0] * 200, "val_ids": np.zeros(0, int), "batches": lambda: iter([([0], [0])] * 9)},
        {"train_ids": [[0, 1], [2]] * 100, "encode": lambda text: [], "decode": lambda ids: "", "train_text": " a "},
        {"train_text": 7, "encode": lambda text: [0], "decode": lambda ids: "a", "end_of_text": 4, "val_ids": [4, 4]},
    ],
)
def test_degenerate_data_ends_in_a_report(given: Given) -> None:
    examined({"vocab_size": 5, **given}).to_json()
