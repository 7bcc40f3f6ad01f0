"""What cannot come: every word that is said to be excluded breaks the story, and training makes it less likely."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from walked_stories import Step

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text import tinyworld
from mlx_gpt.text.corpus import load_corpus
from mlx_gpt.text.excluded import excluded_ids
from mlx_gpt.text.shards import TokenStream, endless_batches
from mlx_gpt.text.tinyworld import Told
from mlx_gpt.text.tinyworld_rules import Rule, Said, Scene, choices, options
from mlx_gpt.text.tinyworld_words import NAMES, PLACES
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train import step as step_module
from mlx_gpt.train.loss import UNLIKELIHOOD, mean_loss, unlikelihood
from mlx_gpt.train.material import Material, prepare
from mlx_gpt.train.step import largest_gradient, make_train_step

B, T, V, K = 4, 24, 60, 3


N = 300  # stories


@pytest.fixture(scope="module")
def marked() -> list[Told]:
    return tinyworld.told(N, seed=0)


@pytest.fixture(scope="module")
def material() -> Material:
    """Every name and place is one token."""
    return prepare(load_corpus("tinyworld", n_stories=600), "bpe:960", exclude=True)


# What the rules say


def test_a_story_is_the_same_with_and_without_what_it_excludes(marked: list[Told], told: list[str]) -> None:
    assert told[:N] == [text for text, _ in marked]


def begins(rule: Rule, scene: Scene, text: str) -> bool:
    """Can a sentence by this rule begin so?"""

    def goes_on(said: Said, sentence: str, slots: list[str], literals: list[str]) -> bool:
        if not sentence.startswith(text[: len(sentence)]):
            return False
        if len(sentence) >= len(text):
            return True
        if not slots:
            return False
        return any(
            goes_on({**said, slots[0]: word}, sentence + word + literals[0], slots[1:], literals[1:])
            for word in options(scene, slots[0], said)
        )

    return goes_on({}, rule.pieces[0], rule.pieces[1::2], rule.pieces[2::2])


def test_of_who_and_where_is_known_what_is_excluded_cannot_stand_there_and_the_rest_can(
    marked: list[Told], walked: list[list[Step]]
) -> None:
    kinds: Counter[str] = Counter()
    for (text, excluded), way in zip(marked, walked[:N], strict=True):
        lengths = [len(step.rule.text.format(**step.said)) + 1 for step in way]  # of the sentences
        starts = [sum(lengths[:i]) for i in range(len(way))]
        for at, words in excluded:
            start, scene = [(start, step.scene) for start, step in zip(starts, way, strict=True) if start < at][-1]
            rules = [rule for rule, _ in choices(scene)]
            stands = re.findall(r"\w+", text[at:])[0]
            assert any(begins(rule, scene, text[start:at] + stands) for rule in rules)
            for word in scene.at if stands in NAMES else scene.at.values():
                assert any(begins(rule, scene, text[start:at] + word) for rule in rules) == (word not in words)
            kinds["name" if stands in NAMES else "place"] += len(words)
    assert kinds["name"] > 500
    assert kinds["place"] > 200


def test_nobody_is_their_own_friend(marked: list[Told]) -> None:
    for text, excluded in marked:
        hero = re.search(r"(\w+) (?:went|ran) to the", text)
        assert hero
        friend = re.search(r"(?:Her|His) \w+ (\w+) (?:went to|was in) the", text)
        assert friend
        assert dict(excluded)[friend.start(1)] == [hero[1]]


def test_no_word_that_is_excluded_begins_another() -> None:
    known = NAMES + PLACES
    assert not [(a, b) for a in known for b in known if a != b and b.startswith(a)]


# Beside the tokens


def test_the_ids_stand_at_the_token_in_whose_place_they_cannot(material: Material) -> None:
    told, stream, tokenizer = tinyworld.told(600, seed=0), material.train, material.tokenizer
    assert stream.excluded is not None
    assert len(stream.excluded) == len(stream.ids)
    found = 0
    for i, (text, excluded) in enumerate(told):
        row = slice(stream.starts[i], stream.starts[i + 1])
        expected = {
            (len(tokenizer.encode(text[: at - 1])) + 1, tokenizer.encode(f" {word}")[0])
            for at, words in excluded
            for word in words
        }
        marks = stream.excluded[row]
        assert {(at, marks[at, k]) for at, k in zip(*np.nonzero(marks >= 0), strict=True)} == expected
        found += len(expected)
    assert found > 1000
    assert not (stream.excluded == stream.ids[:, None]).any()


def test_words_of_several_tokens_are_left_out(marked: list[Told]) -> None:
    tokenizer = Tokenizer.bytes()
    stream = TokenStream.from_documents([text for text, _ in marked], tokenizer)
    assert (excluded_ids(stream, marked, tokenizer) == -1).all()


def test_a_text_knows_what_it_excludes_only_if_asked() -> None:
    assert prepare(load_corpus("tinyworld", n_stories=2), "bytes").train.excluded is None


def test_batches_say_beside_each_target_what_cannot_come(material: Material) -> None:
    stream = material.train
    assert stream.excluded is not None
    plain = endless_batches(TokenStream(stream.ids, stream.starts), 32, 8, seed=3)
    beside: dict[tuple[int, ...], set[tuple[int, ...]]] = {}  # 32 ids in a row -> what may stand beside the last
    for end in range(32, len(stream.ids)):
        beside.setdefault(tuple(stream.ids[end - 31 : end + 1]), set()).add(tuple(stream.excluded[end]))
    for (x, y), (same_x, same_y) in islice(zip(endless_batches(stream, 32, 8, seed=3), plain, strict=False), 20):
        assert (x == same_x).all()
        assert (y[..., 0] == same_y).all()
        assert all(tuple(row[-1, 1:]) in beside[tuple(row[:, 0])] for row in y)


# The step


def small() -> GPT:
    mx.random.seed(0)
    model = GPT(GPTConfig(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2))
    model.wte.weight = 20 * model.wte.weight  # or every token is as likely as any
    return model


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, V, (B, T)).astype(np.int32), rng.integers(-1, V, (B, T, 1 + K)).astype(np.int32)
    y[..., 0] = np.maximum(y[..., 0], 0)
    return x, y


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_follows_the_gradient_of_both(chunked: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "in_chunks", lambda logits, dtype: chunked)
    model, parts = small(), [batch(seed) for seed in range(accumulate)]
    before = dict(tree_flatten(model.trainable_parameters()))

    def loss(model: GPT, weight: float) -> mx.array:
        def one(x: np.ndarray, y: np.ndarray) -> mx.array:
            logits = model(mx.array(x))
            wanted, excluded = mx.array(y[..., 0]), mx.array(y[..., 1:])
            return mean_loss(logits, wanted) + weight * unlikelihood(logits, excluded)

        return sum((one(x, y) for x, y in parts), mx.array(0.0)) / accumulate

    expected = loss(model, 0)
    _, gradient = nn.value_and_grad(model, loss)(model, UNLIKELIHOOD)
    model.train()
    step = make_train_step(model, optim.SGD(1.0), clip=1e9, batch_size=B, accumulate=accumulate)
    x, y = parts[0] if accumulate == 1 else (np.stack([x for x, _ in parts]), np.stack([y for _, y in parts]))
    measured, _ = step(x, y)
    mx.eval(measured, step.state)
    assert measured.item() == pytest.approx(expected.item(), rel=1e-5)
    after = dict(tree_flatten(model.trainable_parameters()))
    for name, slope in tree_flatten(gradient):
        np.testing.assert_allclose(before[name] - after[name], slope, rtol=1e-3, atol=2e-5)


def test_the_weight_that_broke_is_found_with_such_targets_too() -> None:
    model = small()
    model.h[1].mlp.c_fc.bias = mx.full(model.h[1].mlp.c_fc.bias.shape, float("nan"))
    assert np.isnan(largest_gradient(model, *batch())[1])
