"""tinyworld: every generated story parses in one way, with the probability it was generated with."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import pytest
from helpers.derivations import Step

from mlx_gpt.tinyworld import stories as module
from mlx_gpt.tinyworld.rules import allowed_words
from mlx_gpt.tinyworld.stories import Parse, best_loss, generate_stories, generate_story, parse_story, split_sentences
from mlx_gpt.tinyworld.words import LOOKS, NAMES, PLACES, THINGS

# Generating -----------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_stories_and_another_seed_gives_others(stories: list[str]) -> None:
    assert generate_stories(50, seed=0) == stories[:50]  # and fewer stories are the first of more
    assert not set(generate_stories(50, seed=1)) & set(stories)


def test_stories_have_at_least_300_word_forms(stories: list[str]) -> None:
    assert len({word.lower() for text in stories for word in re.findall(r"\w+", text)}) >= 300


def test_ten_thousand_stories_are_all_different_and_have_40_to_120_words(stories: list[str]) -> None:
    assert len(set(stories)) == len(stories) == 10_000
    lengths = [len(text.split()) for text in stories]
    assert min(lengths) >= 40
    assert max(lengths) <= 120


def test_stories_are_the_same_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 30)
    alone = generate_stories(100, seed=4)
    assert alone == generate_stories(100, seed=4, processes=2) == generate_stories(100, seed=4, processes=8)
    assert len(set(alone)) == 100  # no chunk repeats another
    assert generate_stories(40, seed=4, processes=2) == alone[:40]


def test_a_single_chunk_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    assert generate_stories(module.CHUNK // 100, seed=0, processes=8)
    assert generate_stories(0, seed=0, processes=8) == []


def test_no_chunk_of_any_seed_shares_a_story_with_another() -> None:
    chunks = [module._generate_chunk(seed, chunk, 200) for seed in range(4) for chunk in range(3)]
    assert len({story for chunk in chunks for story in chunk}) == 12 * 200


# Parsing --------------------------------------------------------------------------------------------------------------


def test_parsing_inverts_generating_on_ten_thousand_stories(stories: list[str], parses: list[Parse]) -> None:
    assert [parse.error for parse in parses if not parse.valid] == []
    assert [parse.n_sentences for parse in parses] == [len(split_sentences(text)) for text in stories]


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


def test_the_parsed_probability_is_that_of_the_draws() -> None:
    for seed in range(2000):
        rng = Counting(seed)
        text = generate_story(rng)
        assert parse_story(text).log_prob == pytest.approx(rng.log_prob, abs=1e-9)


def test_no_story_has_two_derivations(derivations: list[list[Step]], stories: list[str]) -> None:
    # ``derive`` has asserted that each sentence has one derivation. It is that of the generator:
    for text, derivation in zip(stories[:200], derivations, strict=False):
        assert " ".join(step.rule.text.format(**step.slots) for step in derivation) == text


# Long-range dependencies ----------------------------------------------------------------------------------------------

KINDS = {  # slots for which the scene allows a single word, and its plausible substitutes
    "thing": (("the_thing",), THINGS),
    "look": (("the_look",), LOOKS),
    "place": (("thing_place",), PLACES),
    "name": (("holder", "giver", "receiver", "asked"), NAMES),
}
FAR = 20  # words


class Recalled(NamedTuple):
    """A word determined by one that is ``distance`` words earlier, and the story with a wrong word in its place."""

    sentence: int
    distance: int
    spoiled: str


def recalled(
    derivation: list[Step], names: tuple[str, ...], words: tuple[str, ...], rng: random.Random
) -> Iterator[Recalled]:
    before: list[str] = []
    texts = [step.rule.text.format(**step.slots) for step in derivation]
    for i, step in enumerate(derivation):
        here = re.findall(r"\w+", texts[i])
        for slot in set(names) & set(step.slots):
            word = step.slots[slot]
            if len(allowed_words(step.scene, slot, step.slots)) == 1 and word in before:
                distance = before[::-1].index(word) + 1 + here.index(word)
                other = rng.choice([one for one in words if one not in here])
                spoiled = step.rule.text.format(**{**step.slots, slot: other})
                yield Recalled(i + 1, distance, " ".join([*texts[:i], spoiled, *texts[i + 1 :]]))
        before += here


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_word_is_an_error_even_twenty_words_after_the_right_one(
    kind: str, derivations: list[list[Step]]
) -> None:
    rng = random.Random(0)
    far = [
        found
        for derivation in derivations[:1500]
        for found in recalled(derivation, *KINDS[kind], rng)
        if found.distance > FAR
    ]
    assert len(far) > 200
    for found in far:
        parse = parse_story(found.spoiled)
        assert parse.n_sentences == found.sentence - 1
        assert parse.error.startswith(f"sentence {found.sentence} does not follow: ")


def test_most_stories_have_a_dependency_over_more_than_twenty_words(derivations: list[list[Step]]) -> None:
    rng = random.Random(0)
    far = [
        any(found.distance > FAR for kind in KINDS.values() for found in recalled(derivation, *kind, rng))
        for derivation in derivations[:500]
    ]
    assert sum(far) / len(far) > 0.9


def test_a_wrong_pronoun_is_an_error_in_its_sentence(stories: list[str]) -> None:
    wrong = {"She": "He", "He": "She", "Her": "His", "His": "Her"}
    for text in stories[:500]:
        parts = split_sentences(text)
        for i, sentence in enumerate(parts):
            first, _, rest = sentence.partition(" ")
            if first in wrong:
                parse = parse_story(" ".join([*parts[:i], f"{wrong[first]} {rest}", *parts[i + 1 :]]))
                assert parse.error.startswith(f"sentence {i + 1} ")


# The best possible loss -----------------------------------------------------------------------------------------------


def test_the_best_possible_loss_is_the_negative_log_probability_per_token(
    stories: list[str], parses: list[Parse]
) -> None:
    nats = -sum(parse.log_prob for parse in parses[:100])
    assert best_loss(stories[:100], n_tokens=8000) == pytest.approx(nats / 8000)


def test_a_text_that_is_no_story_has_no_best_possible_loss() -> None:
    with pytest.raises(ValueError, match="expected stories of tinyworld, but sentence 1 is not in the grammar"):
        best_loss([*generate_stories(1, seed=0), "Once upon a time."], 100)
