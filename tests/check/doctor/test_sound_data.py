"""The doctor's checks of data pass texts, tokenizers and batches as people feed them, and survive any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.fed_data import (
    DATA_CHECKS,
    EOT,
    Given,
    bpe,
    characters,
    codes,
    examined,
    fed,
    in_order,
    lower_case,
    padded,
    prose,
    random_windows,
    tiktoken_bpe,
    tinyworld,
    unknown_characters,
    utf8,
    with_ids,
    words,
)
from helpers.plain_gpt import PlainConfig, PlainGPT

from mlx_gpt.check.doctor import examine

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
        {"train_text": ""},
        {"train_ids": [0], "val_ids": [0]},
        {"train_ids": [0] * 200, "batches": lambda: iter([([0], [0])] * 9)},
        {"train_ids": [[0, 1], [2]] * 100, "encode": lambda text: [], "decode": lambda ids: "", "train_text": " a "},
        {"train_text": 7, "encode": lambda text: [0], "decode": lambda ids: "a", "end_of_text": 4, "val_ids": [4, 4]},
    ],
)
def test_degenerate_data_ends_in_a_report(given: Given) -> None:
    examined({"vocab_size": 5, **given}).to_json()
