"""The README's head of weights/tinyworld, L3H0, tells that the object of a story has been introduced.

The third sentence of each story introduces it: "Lily had a red kite." or "Somebody took a red kite to the park."
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt import lens, load
from mlx_gpt.lens.components import without
from mlx_gpt.tinyworld.stories import generate_stories, split_sentences

ROOT = Path(__file__).parent.parent.parent
MODEL, TOKENIZER = load(ROOT / "weights/tinyworld")
HEADS = [f"L{layer}H{head}" for layer in range(6) for head in range(2)]
T = 48  # tokens, more than three sentences have
OPENING = "One sunny morning, Lily went to the garden. She was kind. Lily had a red kite."
INTRODUCES = re.compile(r"\b(?:had a|Somebody took a) ")


class Place(NamedTuple):
    """Tokens of a story: the word that introduces the object, the full stop of its sentence, and the word after it."""

    marker: int
    stop: int
    next_id: int


@pytest.fixture(scope="module")
def stories() -> tuple[mx.array, list[Place]]:
    """The quickstart's validation stories as ids (200, T), cut off after three sentences, and their places."""
    rows, places = [], []
    for story in generate_stories(200, seed=1):
        sentences = split_sentences(story)
        before, ids = (TOKENIZER.encode(" ".join(sentences[:n])) for n in (2, 3))
        word = " Somebody" if sentences[2].startswith("Somebody") else " had"
        marker = ids.index(*TOKENIZER.encode(word, is_start=False), len(before))
        rows.append(TOKENIZER.encode(story)[:T])
        places.append(Place(marker, len(ids) - 1, rows[-1][len(ids)]))
    return mx.array(rows), places


@pytest.fixture(scope="module")
def weights(stories: tuple[mx.array, list[Place]]) -> np.ndarray:
    """How much each head's full stop gives to the word that introduces the object: (200, 12)."""
    ids, places = stories
    _, activations = lens.trace(MODEL, ids, names="blocks.*.attn.hook_pattern")
    pattern = np.stack([np.array(x) for x in activations.values()], axis=1).reshape(len(places), 12, T, T)
    return np.stack([pattern[row, :, place.stop, place.marker] for row, place in enumerate(places)])


def probability_of_the_friend(stories: tuple[mx.array, list[Place]], *parts: str) -> float:
    """The mean probability of " Her" or " His" after the object's sentence, which always follows."""
    ids, places = stories
    logits, _ = lens.trace(MODEL, ids, without(MODEL, parts), ())
    rows = mx.arange(len(places))
    at_stop = mx.softmax(logits[rows, mx.array([place.stop for place in places])], axis=-1)  # (200, V)
    return float(at_stop[rows, mx.array([place.next_id for place in places])].mean().item())


def texts(prompt: str, n: int, *parts: str, temperature: float = 0.0, max_tokens: int = 60) -> list[str]:
    ids = mx.array([TOKENIZER.encode(prompt)] * n)
    edits = without(MODEL, parts)
    new = lens.generate(MODEL, ids, max_tokens, edits=edits, temperature=temperature, seed=1, end_id=TOKENIZER.eot_id)
    return [TOKENIZER.decode(row).partition("<|endoftext|>")[0] for row in new.tolist()]


def test_it_reads_the_word_that_introduces_the_object(weights: np.ndarray) -> None:
    of_head = dict(zip(HEADS, weights.T, strict=True))
    found = of_head.pop("L3H0")
    assert (round(found.mean(), 2), found.min() > 0.95) == (0.99, True)
    assert round(max(other.mean() for other in of_head.values()), 2) == 0.15


def test_without_it_the_friend_who_comes_next_is_not_expected(stories: tuple[mx.array, list[Place]]) -> None:
    assert probability_of_the_friend(stories) > 0.99
    assert probability_of_the_friend(stories, "L3H0") < 0.3
    assert min(probability_of_the_friend(stories, head) for head in HEADS if head != "L3H0") > 0.5


def test_without_it_the_object_is_introduced_again() -> None:
    prompt = OPENING.partition(". ")[0] + "."
    for parts, fewest, most in ([], 0, 0), (["L3H0"], 15, 50), (["L3H1"], 0, 0), (["L4H0"], 0, 0):
        found = texts(prompt, 50, *parts, temperature=0.7)
        assert fewest <= sum(len(INTRODUCES.findall(text)) > 1 for text in found) <= most, parts


def test_the_readme_shows_the_text_with_and_without_it() -> None:
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert OPENING in page
    for parts in [], ["L3H0"]:
        (text,) = texts(OPENING, 1, *parts, max_tokens=20)
        assert text.strip() in page
