"""tinyworld: an invalid text is reported by its first invalid sentence and the reason."""

from __future__ import annotations

from math import log

import pytest

from mlx_gpt.tinyworld.stories import generate_stories, is_sentence, parse_story, split_sentences
from mlx_gpt.tinyworld.words import BOYS, FEELINGS, LOOKS, NAMES, PLACES, ROLES, THINGS, TIMES, WEATHER


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return generate_stories(4000, seed=0)


STORY = (
    "One sunny morning, Lily went to the garden. She was happy. Lily had a red ball. Her brother Tom went to the barn. "
    'Lily took that red ball to the mill. Lily sent that red ball to Tom. "Thank you, Lily," said Tom. Tom was proud. '
    "In the end, Tom had that red ball in the barn. Everyone went home glad."
)


def test_a_handwritten_story_is_valid() -> None:
    parse = parse_story(STORY)
    assert parse.valid
    assert parse.n_sentences == 10


def test_the_probability_of_a_story_is_the_product_of_its_choices() -> None:
    begin = 3 / 4 / (len(WEATHER) * len(TIMES) * len(NAMES) * len(PLACES))
    who = 1 / 3 / len(FEELINGS)
    thing = 4 / 5 / (len(LOOKS) * len(THINGS))
    friend = 2 / 3 / (len(ROLES) * len(BOYS) * len(PLACES))
    parse = parse_story(" ".join(split_sentences(STORY)[:4]))
    assert parse.error == "the story stops after 4 sentences"
    assert parse.log_prob == pytest.approx(log(begin * who * thing * friend))


@pytest.mark.parametrize(
    ("right", "wrong", "sentence", "because"),
    [
        ("She was happy", "He was happy", 2, "does not follow: 'He was happy.' (Lily is in the garden)"),
        ("She was happy", "She was happily", 2, "is not in the grammar: 'She was happily.'"),
        ("Her brother Tom", "Her brother Anna", 4, "is not in the grammar: 'Her brother Anna went to the barn.'"),
        ("Her brother Tom", "Her friend Lily", 4, "does not follow: 'Her friend Lily went to the barn.'"),
        ("red ball to the mill", "red ball to the garden", 5, "does not follow"),  # she is there already
        ("red ball to the mill", "red kite to the mill", 5, "does not follow"),
        (
            "took that red ball to the mill",
            "left that red ball in the garden",
            6,
            "does not follow",
        ),  # she no longer has it
        ("red ball to Tom", "red ball to Lily", 6, "is not in the grammar"),  # a name occurs once
        ("Tom was proud", "Anna was proud", 8, "does not follow: 'Anna was proud.' (Lily is in the mill, Tom is"),
        ("ball in the barn", "ball in the mill", 9, "the ball is with Tom, in the barn)"),
        ("Tom had that red", "Lily had that red", 9, "the ball is with Tom, in the barn)"),
        ("Tom had that red", "Tom had that blue", 9, "does not follow"),
        (". Everyone", ".  Everyone", 10, "does not follow: 'Everyone went home glad.'"),
    ],
)
def test_an_invalid_story_is_reported_by_its_first_invalid_sentence(
    right: str, wrong: str, sentence: int, because: str
) -> None:
    assert STORY.count(right) == 1
    parse = parse_story(STORY.replace(right, wrong))
    assert not parse.valid
    assert parse.n_sentences == sentence - 1
    assert parse.error.startswith(f"sentence {sentence} ")
    assert because in parse.error


@pytest.mark.parametrize("ending", [" ", "\n", " Everyone went home glad.", "?"])
def test_text_after_the_end_of_a_story_is_an_error(ending: str) -> None:
    assert (
        parse_story(STORY + ending).error == f"text after the end of the story: {(STORY + ending)[len(STORY) + 1 :]!r}"
    )


def test_a_story_that_stops_early_is_an_error(stories: list[str]) -> None:
    for text in ["", *stories[:100]]:
        parts = split_sentences(text)
        for n in range(len(parts)):
            parse = parse_story(" ".join(parts[:n]))
            assert (parse.n_sentences, parse.error) == (n, f"the story stops after {n} sentences")
    assert not parse_story(STORY[:-1]).valid


# Single sentences -----------------------------------------------------------------------------------------------------


def test_every_sentence_of_a_story_is_in_the_grammar(stories: list[str]) -> None:
    for text in stories:
        assert " ".join(split_sentences(text)) == text
    everything = {sentence for text in stories for sentence in split_sentences(text)}
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
def test_a_sentence_outside_the_grammar_is_rejected(sentence: str) -> None:
    assert not is_sentence(sentence)


def test_a_sentence_with_a_missing_or_repeated_word_is_rejected(stories: list[str]) -> None:
    for sentence in {sentence for text in stories[:100] for sentence in split_sentences(text)}:
        words = sentence.split()
        for i in range(len(words)):
            assert not is_sentence(" ".join(words[:i] + words[i + 1 :]))
            assert not is_sentence(" ".join([*words[: i + 1], *words[i:]]))
