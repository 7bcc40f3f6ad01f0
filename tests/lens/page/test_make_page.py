"""A page without a given text opens with the explanation's sentence, or with a text in the model's own words."""

from __future__ import annotations

from pathlib import Path

from helpers.lens_model import random_model

from mlx_gpt import load
from mlx_gpt.lens.page import EXPLANATION, default_text
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[3] / "weights" / "tinyworld"


def test_a_vocabulary_with_its_words_gets_the_sentence_of_the_explanation() -> None:
    tokenizer = Tokenizer.train([EXPLANATION] * 9, 300)
    assert default_text(random_model(), tokenizer) == EXPLANATION


def test_a_vocabulary_without_them_gets_a_generated_text() -> None:
    text = default_text(*load(FOLDER))
    assert text.startswith("One ")
    assert text == default_text(*load(FOLDER))


def test_a_vocabulary_that_lacks_its_characters_gets_a_generated_text() -> None:
    text = default_text(random_model(vocab_size=2), CharacterTokenizer({"a": 0, "b": 1}))
    assert set(text) <= {"a", "b"}
    assert text
