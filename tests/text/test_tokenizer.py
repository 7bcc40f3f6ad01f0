"""Encoding and decoding are inverse, and other libraries give the same ids from our files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gpt.errors import TokenizerError, UsageError
from mlx_gpt.text import tokenizer as tokenizer_module
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import SPLIT, Tokenizer, make_tokenizer, merge_bytes, merges_of
from mlx_gpt.text.vocab_files import BYTES, CHARACTERS

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-tokenizer"
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="needs ../shared/data/gpt2-tokenizer")

VARIED = [
    "Hello, world! It's 2024; we'll see, they're here, I'd say: 'tis DON'T.",
    "  leading spaces,   inner   runs, trailing  ",
    "one\ntwo\n\nthree\r\n\tfour \n five\n",
    "naïve café, Ångström, ﬁ, Ελλάδα, Привет, мир",
    "日本語のテキスト 漢字、한국어. ไทย עברית العربية",
    "👩‍👩‍👧 flags 🇩🇪 and 👍🏽 thumbs",
    "x = {'a': [1, 22, 333], \"b\": None}  # ½ ² Ⅷ ٣",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 50 + "!!!!!!!????...",
    "\u00a0\u2003\u3000 odd spaces \x00\x01\x7f",
    "",
]


def some_text(n_words: int = 3000) -> list[str]:
    """Words that share stems and endings, so that there is something to merge; always the same."""
    rng = random.Random(0)
    syllables = ["wa", "lk", "ta", "si", "ng", "é", "the", "日本", "👍", "12", "'ll", "aa", "ing", "ed", "s", "\n"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    return [" ".join(rng.choice(words) for _ in range(n_words // 10)) for _ in range(10)] + VARIED


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(some_text(), 400)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.from_folder(GPT2)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# There and back ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8")))
def test_decoding_inverts_encoding(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, Tokenizer.bytes()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", VARIED, ids=range(len(VARIED)))
def test_a_text_and_a_batch_of_texts_give_the_same_ids(trained: Tokenizer, text: str) -> None:
    assert trained.encode_batch([text, "x", text]) == [trained.encode(text), trained.encode("x"), trained.encode(text)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 399)))
def test_a_stream_decoder_gives_the_text_of_decode(trained: Tokenizer, ids: list[int]) -> None:
    stream = trained.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == trained.decode(ids)


def test_a_stream_decoder_buffers_a_character_until_it_is_complete() -> None:
    tokenizer = Tokenizer.bytes()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("é👍x")] == ["", "é", "", "", "", "👍", "x"]
    assert stream.flush() == ""


def test_a_stream_that_ends_inside_a_character_gives_U_FFFD_and_resets() -> None:
    tokenizer = Tokenizer.bytes()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("👍")[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(i) for i in tokenizer.encode("ok")] == ["o", "k"]


def test_end_of_text_is_plain_text_unless_it_is_allowed_to_be_special(trained: Tokenizer) -> None:
    text = f"a{EOT}b"
    assert trained.eot_id not in trained.encode(text)
    assert trained.eot_id not in trained.encode_batch([text])[0]
    assert trained.encode(text, allow_special=True) == [*trained.encode("a"), trained.eot_id, *trained.encode("b")]
    assert trained.decode(trained.encode(text)) == trained.decode(trained.encode(text, allow_special=True)) == text


@pytest.mark.parametrize("wrong", [400, 50256, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_a_clear_error(trained: Tokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"no token has id {wrong}: the vocabulary's ids are 0 to 399") as e:
        trained.decode([0, wrong, 1])
    one_line(e)


def test_ids_may_be_numpy_integers(trained: Tokenizer) -> None:
    assert trained.decode(np.array(trained.encode("walking"), np.int32)) == "walking"


# The vocabulary ---------------------------------------------------------------------------------------------------


def test_ids_are_the_bytes_in_gpt2s_order_then_the_merges_then_end_of_text(trained: Tokenizer) -> None:
    assert (BYTES[0], BYTES[187], BYTES[188], BYTES[220], BYTES[255]) == (ord("!"), 255, 0, ord(" "), 173)
    assert (CHARACTERS[0], CHARACTERS[188], CHARACTERS[220], CHARACTERS[198]) == ("!", "Ā", "Ġ", "Ċ")
    for tokenizer in (trained, Tokenizer.bytes()):
        assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([b]) for b in BYTES]
        assert all(len(tokenizer.token_bytes(i)) > 1 for i in range(256, tokenizer.vocab_size - 1))
        assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == EOT.encode()
        assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert (trained.vocab_size, Tokenizer.bytes().vocab_size) == (400, 257)


def test_each_merge_joins_two_earlier_tokens(trained: Tokenizer) -> None:
    for rank, (left, right) in enumerate(merges_of(trained.ranks), 256):
        assert trained.ranks[left + right] == rank
        assert max(trained.ranks[left], trained.ranks[right]) < rank


def test_merge_bytes_gives_the_ids_of_tiktoken(trained: Tokenizer) -> None:
    words = [word.encode() for text in some_text() for word in text.split()]
    assert len(words) > 3000
    for word in set(words):
        parts = merge_bytes(word, trained.ranks, below=trained.vocab_size)
        assert [trained.ranks[part] for part in parts] == trained.encode(word.decode())
    ranks = {b"he": 256, b"ll": 257, b"llo": 258}
    assert merge_bytes(b"hello", ranks, below=259) == [b"he", b"llo"]
    assert merge_bytes(b"hello", ranks, below=258) == [b"he", b"ll", b"o"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("abZéß漢🙂 \n\t\r\u00a01٣½'.,-sdmtlvre"), max_size=30))
def test_text_is_split_into_words_as_in_gpt2(text: str) -> None:
    regex = pytest.importorskip("regex")
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2 encoder.py
    assert regex.findall(SPLIT, text) == regex.findall(published, text)


RUNS = " \t\n\r\xa0\u2003\x1c\x85" + "abé日12٣-!'"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs=st.lists(st.tuples(st.sampled_from(RUNS), st.integers(1, 12)), max_size=12))
def test_a_text_cut_inside_long_runs_of_white_space_has_the_ids_of_tiktoken(
    trained: Tokenizer, runs: list[tuple[str, int]]
) -> None:
    text = "".join(character * n for character, n in runs)
    pieces = tokenizer_module._pieces(text, many=3)
    assert "".join(pieces) == text
    for tokenizer in (trained, Tokenizer.bytes()):
        whole = tokenizer._encoding.encode_ordinary(text)
        assert [i for piece in pieces for i in tokenizer._encoding.encode_ordinary(piece)] == whole


@pytest.mark.parametrize("run", [" ", "\t\n ", "\xa0", "a", "1", "-"])
def test_a_run_of_millions_of_characters_is_encoded_in_linear_time(trained: Tokenizer, run: str) -> None:
    text = "a" + run * (1_200_000 // len(run)) + "b "
    started = time.perf_counter()
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.encode_batch(["x", text]) == [trained.encode("x"), ids]
    assert time.perf_counter() - started < 30  # quadratic: hours


def test_a_panic_of_a_library_is_an_error_in_one_line() -> None:
    class PanicException(BaseException):  # as pyo3 makes it
        pass

    class Panicking:
        def __getattr__(self, name: str) -> Any:
            raise PanicException("called `Result::unwrap()`\non an `Err` value: StackOverflow")

    tokenizer = Tokenizer.bytes()
    tokenizer._encoding = Panicking()
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(TokenizerError, match=r"cannot be tokenized .*StackOverflow") as e:
            encode("a")
        one_line(e)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [" ", "\n \t", "\xa0", "a", "ab1-"])
def test_a_vocabulary_is_learned_from_long_runs_in_linear_time(run: str) -> None:
    text = "hello world and the sea\n" * 200
    started = time.perf_counter()
    tokenizer = Tokenizer.train([text + "a" + run * (600_000 // len(run)) + "b\n" + text], 265)
    assert tokenizer.vocab_size == 265
    assert time.perf_counter() - started < 15  # quadratic: seven minutes


def test_training_again_gives_the_same_vocabulary_also_in_another_process_on_one_core(trained: Tokenizer) -> None:
    assert Tokenizer.train(iter(some_text()), 400).hash == trained.hash
    script = "from test_tokenizer import *; print(Tokenizer.train(some_text(), 400).hash)"
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == trained.hash, run.stderr


def test_training_merges_frequent_pairs() -> None:
    tokenizer = Tokenizer.train(["low low low lowest newer wider wider"] * 3, 262)
    assert tokenizer.decode_bytes([256]) == b"lo"
    assert len(tokenizer.encode("low")) == 1
    assert len(tokenizer.encode("owl")) == 3


def test_a_vocabulary_too_large_for_the_text_is_refused_with_the_largest_possible_size() -> None:
    with pytest.raises(UsageError, match=r"too small for a vocabulary of 4096 ids: .* ask for bpe:261 or less") as e:
        Tokenizer.train(["hello hello"], 4096)
    one_line(e)
    assert Tokenizer.train(["hello hello"], 261).vocab_size == 261


def test_a_single_text_needs_no_list() -> None:
    assert Tokenizer.train("hello hello", 260).hash == Tokenizer.train(["hello hello"], 260).hash


def test_vocabularies_differ_in_their_hash(trained: Tokenizer) -> None:
    hashes = {trained.hash, Tokenizer.bytes().hash, Tokenizer.train(some_text(), 399).hash}
    assert len(hashes) == 3
    assert all(len(value) == 64 for value in hashes)


def test_trained_ids_are_those_of_the_tokenizers_library(trained: Tokenizer, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    trained.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(1)
    letters = "walkting jumpsed aaaé日本👍12'll \n"
    texts = [*some_text(), *("".join(rng.choices(letters, k=200)) for _ in range(300))]
    assert [theirs.encode(text).ids for text in texts] == trained.encode_batch(texts)
    assert theirs.get_vocab_size() == 400


# By name ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_chosen_by_name_and_the_text_is_read_only_if_needed(trained: Tokenizer) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("the text was read")
        yield ""

    assert make_tokenizer("bytes", unread()).hash == Tokenizer.bytes().hash
    assert make_tokenizer("bpe:400", some_text()).hash == trained.hash


def test_a_vocabulary_is_learned_from_the_beginning_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*["abcd " * 50] * 2, "wxyz " * 500]
    monkeypatch.setattr(tokenizer_module, "TRAINING_TEXT", 500)
    assert make_tokenizer("bpe:260", texts).hash == Tokenizer.train(texts[:2], 260).hash
    monkeypatch.setattr(tokenizer_module, "TRAINING_TEXT", 3000)
    assert make_tokenizer("bpe:260", texts).hash == Tokenizer.train(texts, 260).hash


@pytest.mark.parametrize("spec", ["", "gpt-2", "bpe", "bpe:", "bpe:many", "bpe:-3", "bpe:400 ", "bpe:4e3", "BPE:400"])
def test_an_unknown_name_is_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(UsageError, match="choose gpt2, bytes, or bpe:N") as e:
        make_tokenizer(spec, [])
    one_line(e)


@pytest.mark.parametrize("n", [0, 256])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"at least 257 ids .*, not {n}") as e:
        make_tokenizer(f"bpe:{n}", some_text())
    one_line(e)


def test_importing_the_tokenizer_imports_no_tokenizer_library() -> None:
    script = "import sys, mlx_gpt.text.tokenizer; print({'tiktoken', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


# Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["all", "vocab.json merges.txt", "tokenizer.json"])
def test_a_saved_tokenizer_loads_unchanged_from_either_kind_of_file(
    trained: Tokenizer, tmp_path: Path, kept: str
) -> None:
    for tokenizer in (trained, Tokenizer.bytes()):
        folder = tmp_path / str(tokenizer.vocab_size)
        tokenizer.save(folder)
        for file in list(folder.iterdir()):
            if kept != "all" and file.name not in kept.split():
                file.unlink()
        again = Tokenizer.from_folder(folder)
        assert again.hash == tokenizer.hash
        assert (again.ranks, again.specials) == (tokenizer.ranks, tokenizer.specials)
        assert again.encode_batch(VARIED) == tokenizer.encode_batch(VARIED)


def test_old_and_new_tokenizer_json_give_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    fast = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").unlink()
    for merges in (list(map(" ".join, pairs := [m.split(" ") for m in fast["model"]["merges"]])), pairs):
        fast["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
        assert Tokenizer.from_folder(tmp_path).hash == trained.hash


@pytest.mark.parametrize("header", ["#version: 0.2\n", "", "\ufeff#version: 0.2\n", "\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_merges_may_lack_the_header_and_have_trailing_lines(
    trained: Tokenizer, tmp_path: Path, header: str, newline: str
) -> None:
    trained.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2\n")
    (tmp_path / "merges.txt").write_bytes((header + lines + "\n\n").replace("\n", newline).encode())
    assert Tokenizer.from_folder(tmp_path).hash == trained.hash


def test_a_duplicate_merge_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    first = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")[1]
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write(first + "\n")
    with pytest.raises(
        TokenizerError, match=r"expected ids that increase in the order of the merges, found .* with id 256"
    ):
        Tokenizer.from_folder(tmp_path)


def test_the_saved_config_has_the_special_tokens_and_the_class(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert {settings[name] for name in ("bos_token", "eos_token", "unk_token")} == {EOT}
    assert settings["added_tokens_decoder"]["399"]["content"] == EOT
    assert not settings["clean_up_tokenization_spaces"], "or transformers 4 takes the space out of ' .'"


def test_a_merge_of_two_hash_signs_is_not_a_header(tmp_path: Path) -> None:
    Tokenizer.train(["## ## ##"], 258).save(tmp_path)
    file = tmp_path / "merges.txt"
    file.write_text("# #\n")
    assert Tokenizer.from_folder(tmp_path).token_bytes(256) == b"##"


def test_tokens_added_beside_end_of_text_keep_their_ids_and_decode(trained: Tokenizer, tmp_path: Path) -> None:
    chat = Tokenizer(trained.ranks, trained.specials | {"<|user|>": 401, "wörtlich": 405})
    chat.save(tmp_path)
    (tmp_path / "again").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy(tmp_path / name, tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert (again.hash, again.vocab_size, again.eot_id) == (chat.hash, 406, 399)
    assert again.decode([401, *trained.encode("talking"), 405]) == "<|user|>talkingwörtlich"
    assert again.encode("<|user|>", allow_special=True) == [401]
    with pytest.raises(ValueError, match="no token has id 402"):
        again.decode([402])


def test_ids_that_start_with_the_special_tokens_are_kept(trained: Tokenizer, tmp_path: Path) -> None:
    moved = Tokenizer({token: i + 1 for token, i in trained.ranks.items()}, {EOT: 0})
    moved.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.eot_id, again.vocab_size, again.hash) == (0, 400, moved.hash)
    assert again.encode("walking") == [i + 1 for i in trained.encode("walking")]


def damage(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_folder_with_a_file_missing_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    for present, found in (("vocab.json", "only vocab.json"), ("merges.txt", "only merges.txt"), (None, "neither")):
        folder = tmp_path / str(present)
        trained.save(folder)
        for file in list(folder.iterdir()):
            if file.name != present:
                file.unlink()
        with pytest.raises(TokenizerError, match=f"expected vocab.json and merges.txt, .*, found {found}; copy") as e:
            Tokenizer.from_folder(folder)
        one_line(e)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("vocab.json", "{", "[", r"vocab\.json: expected JSON, found"),
        ("vocab.json", '"!": 0', '"!": "zero"', r"expected whole numbers as ids, found '!' with id 'zero'"),
        ("vocab.json", '"!": 0', '"!": 1', r"expected a different id for each token, found 400 tokens with 399 ids"),
        ("vocab.json", '"!": 0, ', "", r"expected all 256 bytes in the vocabulary, found 255, without '!'"),
        ("vocab.json", '"wa"', '"wz"', r"vocab\.json or merges\.txt: expected merges of two earlier tokens"),
        ("vocab.json", '"wa": 2', '"w a": 2', r"vocab\.json or merges\.txt: expected merges of two earlier tokens"),
        ("vocab.json", ": 256", ": 999", r"expected ids that increase in the order of the merges"),
        ("merges.txt", "\n", "\nĠ x\n", r"into one of the vocabulary, found 'Ġ' 'x'"),
        ("merges.txt", "\n", "\nthree tokens here\n", r"a space between them in line 2, found 'three tokens here'"),
        ("merges.txt", "\n", "\n\n", r"in line 2, found ''"),
        (
            "tokenizer.json",
            '"type": "BPE"',
            '"type": "Unigram"',
            r"expected GPT-2's kind, .*, found Unigram on ByteLevel",
        ),
        ("tokenizer.json", '"use_regex": true', '"use_regex": false', "belongs to another kind of model"),
        ("tokenizer.json", '"model": {', '"model": {"dropout": 0.1, ', "without dropout 0.1; this folder belongs"),
        ("tokenizer.json", '"model": {', '"model": {"ignore_merges": true, ', "without ignore_merges True; this"),
        ("tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}', "belongs to another kind of model"),
        ("tokenizer.json", '"model"', '"modell"', r"the format of the tokenizers library, found KeyError: 'model'"),
        ("tokenizer.json", '"merges": [', '"merges": [3, ', r"the format of the tokenizers library, found TypeError"),
    ],
)
def test_a_damaged_file_is_reported_with_what_was_expected_and_found(
    trained: Tokenizer, tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    trained.save(tmp_path)
    damage(tmp_path, name, old, new)
    with pytest.raises(TokenizerError, match=message) as e:
        Tokenizer.from_folder(tmp_path)
    assert one_line(e).startswith(str(tmp_path / name)), "the file to blame"
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(TokenizerError, match=message) as e:
            Tokenizer.from_folder(tmp_path)
        assert one_line(e).startswith(str(tmp_path / name))


def test_truncated_merges_are_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(merges[:100]), encoding="utf-8")
    with pytest.raises(
        TokenizerError, match=r"merges\.txt: expected a merge for each token, found none for 44, the first"
    ):
        Tokenizer.from_folder(tmp_path)


def test_files_that_are_not_utf8_are_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff\xfe\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: expected UTF-8 text, found the byte 0xff at 14"):
        Tokenizer.from_folder(tmp_path)


def test_a_vocabulary_that_no_merges_make_is_not_saved(tmp_path: Path) -> None:
    ranks = {bytes([b]): i for i, b in enumerate(BYTES)} | {b"abc": 256}
    with pytest.raises(TokenizerError, match=r"token 'abc' \(id 256\) should be made of two earlier tokens, found 3"):
        Tokenizer(ranks, {EOT: 257}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# GPT-2 ------------------------------------------------------------------------------------------------------------


@needs_gpt2
def test_gpt2s_folder_gives_the_published_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    text = "We study empirical scaling laws for language model performance on the cross-entropy loss."
    ids = "1135 2050 21594 20796 3657 329 3303 2746 2854 319 262 3272 12 298 28338 2994 13"
    assert gpt2.encode(text) == list(map(int, ids.split()))
    assert gpt2.decode([464, 3290, 373]) == "The dog was"


@needs_gpt2
def test_saving_gpt2_gives_openais_files_byte_for_byte(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (GPT2 / name).read_bytes()
    assert gpt2.hash == hashlib.sha256((GPT2 / "vocab.json").read_bytes()).hexdigest()
    (tmp_path / "merges.txt").unlink()
    assert Tokenizer.from_folder(tmp_path).hash == gpt2.hash


@pytest.fixture
def no_tiktoken_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """tiktoken as on a new machine whose only way out is a proxy that is not there."""
    import tiktoken

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


@needs_gpt2
def test_tiktokens_gpt2_is_the_folders(gpt2: Tokenizer, no_tiktoken_cache: Path) -> None:
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for theirs, ours in (("vocab.bpe", "merges.txt"), ("encoder.json", "vocab.json")):
        shutil.copy(GPT2 / ours, no_tiktoken_cache / hashlib.sha1((address + theirs).encode()).hexdigest())
    published = make_tokenizer("gpt2", [])
    assert (published.ranks, published.specials, published.hash) == (gpt2.ranks, gpt2.specials, gpt2.hash)
    assert published.encode_batch(VARIED) == gpt2.encode_batch(VARIED)


def test_without_a_network_the_error_of_gpt2_has_the_remedy(no_tiktoken_cache: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"could not be downloaded \(ProxyError\): connect .* or load a GPT-2"
    ) as e:
        Tokenizer.gpt2()
    one_line(e)


# transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kept", ["all", "vocab.json merges.txt tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["trained", "chat", pytest.param("gpt2", marks=needs_gpt2)])
def test_transformers_reads_our_folder_and_gives_our_ids(
    trained: Tokenizer, request: pytest.FixtureRequest, tmp_path: Path, kind: str, kept: str
) -> None:
    transformers = pytest.importorskip("transformers")
    chat = Tokenizer(trained.ranks, trained.specials | {"<|user|>": 400})
    ours = chat if kind == "chat" else request.getfixturevalue(kind)
    ours.save(tmp_path)
    for file in list(tmp_path.iterdir()):
        if kept != "all" and file.name not in kept.split():
            file.unlink()
    for loader in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        theirs = loader.from_pretrained(tmp_path)
        assert "GPT2Tokenizer" in type(theirs).__name__
        assert len(theirs) == ours.vocab_size
        for text in (*VARIED, *some_text(), f"one{EOT}two", " " * 100, "<|user|>Hi"):
            ids = ours.encode(text, allow_special=True)  # transformers always parses special tokens
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids) == text
        assert (theirs.eos_token, theirs.bos_token, theirs.unk_token) == (EOT, EOT, EOT)
        assert theirs.eos_token_id == ours.eot_id
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.from_folder(tmp_path / "theirs").hash == ours.hash
