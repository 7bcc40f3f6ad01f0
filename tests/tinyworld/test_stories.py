"""tinyworld: what is told can be read, exactly once, with the probability it was told with."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import pytest
from helpers.walked_stories import Step

from mlx_gpt.tinyworld.rules import (
    options,
)
from mlx_gpt.tinyworld.stories import Reading, best_loss, read_story, sentences, stories, story
from mlx_gpt.tinyworld.words import LOOKS, NAMES, PLACES, THINGS

# Told -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_tells_the_same_stories_and_another_seed_others(told: list[str]) -> None:
    assert stories(50, seed=0) == told[:50]  # and fewer stories are the first of more
    assert not set(stories(50, seed=1)) & set(told)


def test_the_world_has_at_least_300_word_forms(told: list[str]) -> None:
    assert len({word.lower() for text in told for word in re.findall(r"\w+", text)}) >= 300


def test_ten_thousand_stories_are_all_different_and_have_40_to_120_words(told: list[str]) -> None:
    assert len(set(told)) == len(told) == 10_000
    lengths = [len(text.split()) for text in told]
    assert min(lengths) >= 40
    assert max(lengths) <= 120


# Read -------------------------------------------------------------------------------------------------------------


def test_reading_inverts_telling_on_ten_thousand_stories(told: list[str], readings: list[Reading]) -> None:
    assert [reading.broken for reading in readings if not reading.valid] == []
    assert [reading.sentences for reading in readings] == [len(sentences(text)) for text in told]


class Counting(random.Random):
    """Sums the log-probabilities of what is drawn from it."""

    log_prob = 0.0

    def choices(self, population: Any, weights: Any = None, **options: Any) -> Any:
        (drawn,) = super().choices(population, weights, **options)
        self.log_prob += log(weights[population.index(drawn)] / sum(weights))
        return [drawn]

    def choice(self, seq: Any) -> Any:
        self.log_prob -= log(len(seq))
        return super().choice(seq)


def test_the_probability_that_is_read_is_the_one_it_was_told_with() -> None:
    for seed in range(2000):
        rng = Counting(seed)
        text = story(rng)
        assert read_story(text).log_prob == pytest.approx(rng.log_prob, abs=1e-9)


def test_no_story_can_be_read_in_two_ways(walked: list[list[Step]], told: list[str]) -> None:
    # ``steps`` has asserted that each sentence fits one rule, in one way. It is the way the reader took:
    for text, way in zip(told[:200], walked, strict=False):
        assert " ".join(step.rule.text.format(**step.said) for step in way) == text


# Over twenty words and more ---------------------------------------------------------------------------------------

KINDS = {  # slots in which the scene leaves one word only, and what else might be thought to stand there
    "thing": (("the_thing",), THINGS),
    "look": (("the_look",), LOOKS),
    "place": (("thing_place",), PLACES),
    "name": (("holder", "giver", "receiver", "asked"), NAMES),
}
FAR = 20  # words


class Recalled(NamedTuple):
    """A word that had to be carried over ``distance`` words, and the same story with another word in its place."""

    sentence: int
    distance: int
    spoiled: str


def recalled(way: list[Step], slots: tuple[str, ...], words: tuple[str, ...], rng: random.Random) -> Iterator[Recalled]:
    before: list[str] = []
    texts = [step.rule.text.format(**step.said) for step in way]
    for i, step in enumerate(way):
        spoken = re.findall(r"\w+", texts[i])
        for slot in set(slots) & set(step.said):
            word = step.said[slot]
            if len(options(step.scene, slot, step.said)) == 1 and word in before:
                distance = before[::-1].index(word) + 1 + spoken.index(word)
                other = rng.choice([one for one in words if one not in spoken])
                spoiled = step.rule.text.format(**{**step.said, slot: other})
                yield Recalled(i + 1, distance, " ".join([*texts[:i], spoiled, *texts[i + 1 :]]))
        before += spoken


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_word_breaks_the_story_even_twenty_words_after_the_right_one(
    kind: str, walked: list[list[Step]]
) -> None:
    rng = random.Random(0)
    far = [found for way in walked[:1500] for found in recalled(way, *KINDS[kind], rng) if found.distance > FAR]
    assert len(far) > 200
    for found in far:
        reading = read_story(found.spoiled)
        assert reading.sentences == found.sentence - 1
        assert reading.broken.startswith(f"sentence {found.sentence} does not follow: ")


def test_most_stories_recall_something_over_more_than_twenty_words(walked: list[list[Step]]) -> None:
    rng = random.Random(0)
    far = [
        any(found.distance > FAR for kind in KINDS.values() for found in recalled(way, *kind, rng))
        for way in walked[:500]
    ]
    assert sum(far) / len(far) > 0.9


def test_a_wrong_pronoun_breaks_the_story_in_its_sentence(told: list[str]) -> None:
    wrong = {"She": "He", "He": "She", "Her": "His", "His": "Her"}
    for text in told[:500]:
        parts = sentences(text)
        for i, sentence in enumerate(parts):
            first, _, rest = sentence.partition(" ")
            if first in wrong:
                reading = read_story(" ".join([*parts[:i], f"{wrong[first]} {rest}", *parts[i + 1 :]]))
                assert reading.broken.startswith(f"sentence {i + 1} ")


# The best possible loss -------------------------------------------------------------------------------------------


def test_the_best_possible_loss_is_what_the_stories_take_over_the_number_of_tokens(
    told: list[str], readings: list[Reading]
) -> None:
    nats = -sum(reading.log_prob for reading in readings[:100])
    assert best_loss(told[:100], n_tokens=8000) == pytest.approx(nats / 8000)


def test_a_text_that_is_no_story_has_no_best_possible_loss() -> None:
    with pytest.raises(ValueError, match="expected stories of tinyworld, but sentence 1 is not of this world"):
        best_loss([*stories(1, seed=0), "Once upon a time."], 100)
