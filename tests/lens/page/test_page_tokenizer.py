"""The page's tokenizer gives the ids and the text of Python's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import open_page
from helpers.lens_model import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gpt.errors import TokenizerError
from mlx_gpt.lens.page import make_page
from mlx_gpt.text.added_tokens import AddedToken
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.token_settings import TokenSettings
from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser
TINYWORLD = Path(__file__).parents[3] / "weights/tinyworld"
TEXTS = {
    "empty": "",
    "a sentence": "The ancient oak tree provided cool shade on the hot summer day.",
    "contractions": "I'm we're they've it's don't he'll she'd I'M 'S 's''s o'clock",
    "digits": "0123456789 3.14 ½ ² Ⅷ ٣٤٥ 1st",
    "spaces": "a  b   c    \n\n  d \t\te\r\nf   ",
    "spaces at the start": "   a",
    "spaces only": " \n \t ",
    "spaces that JavaScript counts otherwise": "a\ufeffb \ufeff c\x85d\x85\x85 e\u180ef\x1cg\x1f h",
    "spaces of Unicode": "a\xa0b\xa0\xa0c\u2003d\u3000e\u2028f\u2029g\u200bh\u202fi",
    "emoji": "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈👍🏽 🇫🇷 ❤️",
    "combining marks": "e\u0301 a\u0308\u0323 \u0301x n\u0303\u0303",
    "arabic": "مَرْحَبًا بِالعَالَم ، كيف حالك؟",
    "other scripts": "नमस्ते दुनिया 你好，世界 こんにちは안녕 Ελλάδα Россия ไทย",
    "outside the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 𝟘𝟙",
    "special tokens": "one<|endoftext|>two<|endoftext|>\n\n three <|endoftext|><|endoftext|>",
    "almost special": "<|endoftext| > <|endoftext <|ENDOFTEXT|>",
    "halves of surrogate pairs": "a\ud800b\udc00 \udfff\ud83d x\ud83d",
    "control characters": "\x00\x01\x7f\x80\x9f\u200e\u202e",
    "a byte order mark first": "\ufeffabc",
    "punctuation": '"Hello," (she) said... -- [ok]; {a_b} #1 @x $5 100% a/b\\c ~`^|<>=+*&',
    "a long word": "ab" * 700 + "é" * 300,
}
WORDS = "don't we'll it's the cat the dog thé café naïve 🙂🙂 👩‍👩‍👧 مرحبا مرحبا 12 123 1234   \n\n\t  ... ... end."
RARE = "\x85\x85\x85\x85 a\ufeff\ufeff b\ufeff\ufeff"


def flavors() -> dict[str, Tokenizer]:
    trained = Tokenizer.train([(WORDS + RARE) * 3], 300)
    top = trained.vocab_size
    added = [
        AddedToken("<|endoftext|>", trained.eot_id),
        AddedToken("<left>", top, lstrip=True),
        AddedToken("<right>", top + 1, special=False, rstrip=True),
        AddedToken("word", top + 2, special=False, single_word=True),
        AddedToken("<late>", top + 3, special=False, normalized=True),
        AddedToken("<late><right>", top + 4, special=False),
        AddedToken("é+", top + 5, special=False),
        AddedToken("<right>s", top + 6, special=False),
    ]
    specials = {token.text: token.id for token in added}
    named = {"eos_token": "<|endoftext|>"}
    eot = trained.eot_id
    surrounded = TokenSettings(tuple(added), named, (eot,), eot, (eot, top), (top + 1,), add_prefix_space=True)
    opened = TokenSettings(tuple(added), named, (eot,), eot, (eot,))
    unmerged = trained.ranks | {b" qzx": top + 7}  # which no merges make
    return {
        "tinyworld": Tokenizer.from_folder(TINYWORLD),
        "bytes": Tokenizer.bytes(),
        "trained": trained,
        "with added tokens and a space before": Tokenizer(trained.ranks, specials, surrounded),
        "with a start token": Tokenizer(unmerged, specials, opened),
    }


ADDED = {
    "added tokens": "a <left> b<right>  c word words word-word a_word wordé\u0301 word\u0301 <late><right> <late> é+é+",
    "at the ends": "<left>word",
    "of a long one": "<late><right><late>  <right>\n\n<left><left>",
    "space before an added token": "  <left>  x",
    "a token that begins another": "<right>s <right> s <right>ss",
    "a token that no merges make": "a qzx qzxy qzx",
}


def units(text: str) -> list[int]:
    """Return UTF-16 code units, which carry halves of surrogate pairs too."""
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16).tolist()


@pytest.fixture(scope="module", params=flavors().items(), ids=lambda flavor: flavor[0])
def flavor(request: pytest.FixtureRequest, modules: Any) -> Tokenizer:
    tokenizer = request.param[1]
    modules.open_tokenizer(tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", [*TEXTS, *ADDED])
def test_ids_are_pythons(modules: Any, flavor: Tokenizer, name: str) -> None:
    text = {**TEXTS, **ADDED}[name]
    ids = flavor.encode_prompt(text)
    assert modules("encode", units(text)) == ids
    assert modules("decode", ids) == flavor.decode(ids)


def test_tokens_that_are_no_character_show_their_bytes_as_in_python(modules: Any, flavor: Tokenizer) -> None:
    ids = [i for i in range(flavor.vocab_size) if i in {*flavor.encode("".join(TEXTS.values())), *range(256)}]
    expected = [flavor.token_bytes(i).decode(errors="backslashreplace") for i in ids]
    assert modules("tokenTexts", ids) == expected
    assert any(text.startswith(r"\x") for text in expected)


characters = st.one_of(
    st.characters(),  # of all of Unicode, halves of surrogate pairs included
    st.sampled_from("aA1 \n\t\xa0\x85\ufeff'🙂é\u0301\u200d"),
    st.sampled_from(["'s", "'ll", "  ", "the", "<|endoftext|>", "<left>", "<right>", "word", "<late>", "é+"]),
)


@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
@given(parts=st.lists(characters, max_size=30), ids=st.lists(st.integers(0, 256), max_size=20))
def test_ids_of_generated_texts_are_pythons(modules: Any, flavor: Tokenizer, parts: list[str], ids: list[int]) -> None:
    text = "".join(parts)
    assert modules("encode", units(text)) == flavor.encode_prompt(text), ascii(text)
    assert modules("decode", ids) == flavor.decode(ids)  # of bytes that are no UTF-8


def test_a_page_names_a_character_that_its_model_does_not_know(browser: Any, tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer({character: i for i, character in enumerate("\n abcde")})
    file = tmp_path / "page.html"
    file.write_text(make_page(random_model(vocab_size=7), tokenizer, ["abc"])[0], encoding="utf-8")
    with open_page(browser, file) as page:
        page.wait_for_function("() => globalThis.mlxGptPage?.run && !mlxGptPage.busy")
        page.fill("#text", "abz")
        page.wait_for_function("() => !mlxGptPage.busy")
        assert "the model knows 7 characters" in page.locator(".input p.note").inner_text()
        page.fill("#text", "abcd")
        page.wait_for_function("() => mlxGptPage.run.ids.length === 4 && !mlxGptPage.busy")
        assert page.locator(".input p.note").inner_text() == ""


def test_characters_are_pythons_and_unknown_ones_are_named(modules: Any) -> None:
    tokenizer = CharacterTokenizer({character: i for i, character in enumerate("\n abcdeé🙂")})
    modules.open_tokenizer(tokenizer)
    text = "abé🙂 c\nd"
    assert modules("encode", units(text)) == tokenizer.encode_prompt(text)
    assert modules("decode", tokenizer.encode(text)) == text
    with pytest.raises(TokenizerError, match="the model knows 9 characters, and 'z' is none of them"):
        tokenizer.encode("z")
    with pytest.raises(Exception, match='the model knows 9 characters, and "z" is none of them'):
        modules("encode", units("z"))
