"""tinyworld: what is no story, or no sentence, is told by its first wrong sentence and why."""

from __future__ import annotations

from math import log

import pytest

from mlx_gpt.tinyworld.stories import is_sentence, read_story, sentences, stories
from mlx_gpt.tinyworld.words import BOYS, FEELINGS, LOOKS, NAMES, PLACES, ROLES, THINGS, TIMES, WEATHER


@pytest.fixture(scope="module")
def told() -> list[str]:
    return stories(4000, seed=0)


TALE = (
    "One sunny morning, Lily went to the garden. She was happy. Lily had a red ball. Her brother Tom went to the barn. "
    'Lily took that red ball to the mill. Lily sent that red ball to Tom. "Thank you, Lily," said Tom. Tom was proud. '
    "In the end, Tom had that red ball in the barn. Everyone went home glad."
)


def test_a_tale_told_by_hand_is_a_story() -> None:
    reading = read_story(TALE)
    assert reading.valid
    assert reading.sentences == 10


def test_the_probability_of_a_tale_is_the_product_of_its_choices() -> None:
    begin = 3 / 4 / (len(WEATHER) * len(TIMES) * len(NAMES) * len(PLACES))
    who = 1 / 3 / len(FEELINGS)
    thing = 4 / 5 / (len(LOOKS) * len(THINGS))
    friend = 2 / 3 / (len(ROLES) * len(BOYS) * len(PLACES))
    reading = read_story(" ".join(sentences(TALE)[:4]))
    assert reading.broken == "the story stops after 4 sentences"
    assert reading.log_prob == pytest.approx(log(begin * who * thing * friend))


@pytest.mark.parametrize(
    ("right", "wrong", "sentence", "because"),
    [
        ("She was happy", "He was happy", 2, "does not follow: 'He was happy.' (Lily is in the garden)"),
        ("She was happy", "She was happily", 2, "is not of this world: 'She was happily.'"),
        ("Her brother Tom", "Her brother Anna", 4, "is not of this world: 'Her brother Anna went to the barn.'"),
        ("Her brother Tom", "Her friend Lily", 4, "does not follow: 'Her friend Lily went to the barn.'"),
        ("red ball to the mill", "red ball to the garden", 5, "does not follow"),  # she is there already
        ("red ball to the mill", "red kite to the mill", 5, "does not follow"),
        ("took that red ball to the mill", "left that red ball in the garden", 6, "does not follow"),  # she has it not
        ("red ball to Tom", "red ball to Lily", 6, "is not of this world"),  # nobody sends to themselves
        ("Tom was proud", "Anna was proud", 8, "does not follow: 'Anna was proud.' (Lily is in the mill, Tom is"),
        ("ball in the barn", "ball in the mill", 9, "the ball is with Tom, in the barn)"),
        ("Tom had that red", "Lily had that red", 9, "the ball is with Tom, in the barn)"),
        ("Tom had that red", "Tom had that blue", 9, "does not follow"),
        (". Everyone", ".  Everyone", 10, "does not follow: 'Everyone went home glad.'"),
    ],
)
def test_a_broken_tale_is_told_by_its_first_wrong_sentence(right: str, wrong: str, sentence: int, because: str) -> None:
    assert TALE.count(right) == 1
    reading = read_story(TALE.replace(right, wrong))
    assert not reading.valid
    assert reading.sentences == sentence - 1
    assert reading.broken.startswith(f"sentence {sentence} ")
    assert because in reading.broken


@pytest.mark.parametrize("ending", [" ", "\n", " Everyone went home glad.", "?"])
def test_a_story_that_goes_on_is_broken(ending: str) -> None:
    assert read_story(TALE + ending).broken == f"the story is over, but goes on: {(TALE + ending)[len(TALE) + 1 :]!r}"


def test_a_story_that_stops_early_is_broken(told: list[str]) -> None:
    for text in ["", *told[:100]]:
        parts = sentences(text)
        for n in range(len(parts)):
            reading = read_story(" ".join(parts[:n]))
            assert (reading.sentences, reading.broken) == (n, f"the story stops after {n} sentences")
    assert not read_story(TALE[:-1]).valid


# One sentence alone -----------------------------------------------------------------------------------------------


def test_every_sentence_of_a_story_is_one_of_this_world(told: list[str]) -> None:
    for text in told[:4000]:
        assert " ".join(sentences(text)) == text
    everything = {sentence for text in told[:4000] for sentence in sentences(text)}
    assert [sentence for sentence in everything if not is_sentence(sentence)] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "Tom.",
        "ball the sent Tom to Lily.",
        "Her sister Tom went to the garden.",
        "His brother Anna was in the barn too.",
        "She was a kind boy.",
        "Tom sent that red ball to Tom.",
        '"Thank you, Lily," said Lily.',
        '"Where are you, Tom?" asked Tom.',
        "Tom and Tom were happy.",
        "Tom sent that red garden to Lily.",
        "Tom was in the ball.",
        "Tom went to the barn.",
        "Tom was happy",
        "Tom was happy. ",
        " Tom was happy.",
        "tom was happy.",
        "Tom was happy. Tom was sad.",
        "In the end, Tom had that ball.",
        "In the end, Tom had that ball red.",
    ],
)
def test_what_is_no_sentence_of_this_world_is_refused(sentence: str) -> None:
    assert not is_sentence(sentence)


def test_a_sentence_that_lacks_a_word_or_says_one_twice_is_refused(told: list[str]) -> None:
    for sentence in {sentence for text in told[:100] for sentence in sentences(text)}:
        words = sentence.split()
        for i in range(len(words)):
            assert not is_sentence(" ".join(words[:i] + words[i + 1 :]))
            assert not is_sentence(" ".join([*words[: i + 1], *words[i:]]))
