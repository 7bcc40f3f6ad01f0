"""The token settings of a folder are applied as transformers applies them to GPT-2, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gpt import GPT, GPTConfig, generate, load, save
from mlx_gpt.errors import TokenizerError, UsageError
from mlx_gpt.store.folder import read_tokenizer
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer

SMALL = Tokenizer.train(["the sea was calm, the ship came home to the harbour; a<x>b [x] word " * 20], 290)
V = SMALL.vocab_size
WORD, WORD_ID = next((name.decode(), i) for name, i in SMALL.ranks.items() if len(name) > 1 and name.isalpha())
TEXTS = [
    "",
    " ",
    "the sea",
    " the sea",
    f"the{EOT}sea {EOT} a",
    "a<x>b  <x>  c<x><x> xx<x>",
    "sea seaside thesea sea, _sea é sea sea",
    "</s> the <s> sea<pad>",
    "one\n\n<x>\n two\t<y>",
    "日本<x>é👍",
]
FILES = {"config": "tokenizer_config.json", "special": "special_tokens_map.json", "added": "added_tokens.json"}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {EOT: {"id": EOT, "ids": [V - 1], "tokens": [EOT]}},
}
WORDS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ROBERTA = {"type": "RobertaProcessing", "sep": [EOT, V - 1], "cls": [EOT, V - 1]}
ROBERTA |= {"trim_offsets": True, "add_prefix_space": False}


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": text, **plain, **flags}


def folder_of(path: Path, fast: Callable[[dict[str, Any]], Any] | None = None, **files: Any) -> Path:
    """Write the folder of a GPT-2 with these settings files; with ``fast`` also a changed tokenizer.json."""
    SMALL.save(path)
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    if fast:
        fast(content)
        (path / "tokenizer.json").write_text(json.dumps(content))
    (path / FILES["config"]).unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": V}))
    for name, settings in files.items():
        (path / FILES[name]).write_text(json.dumps(settings))
    return path


def changed(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update(settings)


def with_added(*tokens: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["added_tokens"].extend({"id": V + i, **token} for i, token in enumerate(tokens))


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
VARIANTS: dict[str, dict[str, Any]] = {
    "no settings": {},
    "a space before": {"config": {"add_prefix_space": True}},
    "a space before, beside tokenizer.json": {"config": {"add_prefix_space": True}, "fast": changed()},
    "a space before, in tokenizer.json only": {"fast": lambda c: c["pre_tokenizer"].update(add_prefix_space=True)},
    "a space before, in a tokenizer.json taken as it is": {
        "config": FAST,
        "fast": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    },
    "no space before, in a tokenizer.json taken as it is": {
        "config": FAST | {"add_prefix_space": True},
        "fast": changed(),
    },
    "BOS": {"config": {"add_bos_token": True}},
    "BOS and EOS": {"config": {"add_bos_token": True, "add_eos_token": True}},
    "BOS, beside tokenizer.json": {"config": {"add_bos_token": True}, "fast": changed()},
    "another BOS": {"config": {"add_bos_token": True, "bos_token": "<s>"}},
    "a template": {"fast": changed(post_processor=TEMPLATE)},
    "a template in a sequence": {"fast": changed(post_processor={"type": "Sequence", "processors": [WORDS, TEMPLATE]})},
    "as RoBERTa": {"fast": changed(post_processor=ROBERTA)},
    "no post-processor": {"fast": changed(post_processor=None)},
    "truncation and padding": {
        "fast": changed(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        )
    },
    "other names": {"config": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}},
    "no names": {"config": dict.fromkeys(("bos_token", "eos_token", "unk_token"))},
    "names with flags": {
        "config": {},
        "special": {"eos_token": token("</s>", rstrip=True, normalized=True), "pad_token": "<pad>"},
    },
    "more special tokens": {"config": {"additional_special_tokens": ["<x>", "<y>"]}},
    "more special tokens by name": {"config": {"image_token": "<x>", "extra_special_tokens": {"video_token": "<y>"}}},
    "added_tokens.json": {"config": {}, "added": {"<x>": V, "<y>": V + 1}},
    "an added token like a word": {"config": {}, "added": {"sea": V}},
    "an added token of the vocabulary": {"config": {"added_tokens_decoder": {str(WORD_ID): token(WORD)}}},
    "added and named": {"config": {"pad_token": "<x>"}, "added": {"<x>": V, "<y>": V + 1}},
    **{
        f"an added token: {name}": {
            "config": {"added_tokens_decoder": {str(V): token("<x>", **flags), str(V + 1): token("sea", **flags)}}
        }
        for name, flags in {
            "lstrip": {"lstrip": True},
            "rstrip": {"rstrip": True},
            "both": {"lstrip": True, "rstrip": True},
            "a single word": {"single_word": True},
            "normalized": {"normalized": True},
            "special, lstrip": {"lstrip": True, "special": True},
            "special, a single word": {"single_word": True, "special": True},
            "with everything": {"single_word": True, "lstrip": True, "rstrip": True, "normalized": True},
        }.items()
    },
    "overlapping tokens": {
        "config": {
            "added_tokens_decoder": {
                str(V): token("<x>b"),
                str(V + 1): token("<x>"),
                str(V + 2): token("a<x", normalized=True),
                str(V + 3): token("  "),
            }
        }
    },
    "tokens of tokenizer.json": {"fast": with_added(token("<x>", lstrip=True), token("sea", single_word=True))},
    "tokens of a tokenizer.json taken as it is": {
        "config": FAST,
        "fast": with_added(token("<x>", lstrip=True), token("sea", single_word=True)),
    },
    "tokens of both files": {
        "config": FAST | {"added_tokens_decoder": {str(V): token("<x>", rstrip=True)}},
        "fast": with_added(token("<x>", lstrip=True), token("<y>")),
    },
    "a space before and added tokens": {"config": {"add_prefix_space": True}, "added": {"<x>": V}},
    "the class GPT2TokenizerFast": {"config": {"tokenizer_class": "GPT2TokenizerFast"}, "fast": changed()},
    "merges as pairs": {
        "fast": lambda c: c["model"].update(merges=[merge.split(" ") for merge in c["model"]["merges"]])
    },
}


@pytest.mark.parity
@pytest.mark.parametrize("again", [False, True], ids=["read", "saved and read"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ids_and_texts_are_those_of_transformers(tmp_path: Path, variant: str, again: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / "model", **VARIANTS[variant])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    if again:
        ours.save(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((folder / "config.json").read_text())
        theirs_again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert [theirs_again(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
        ours = Tokenizer.from_folder(tmp_path / "saved")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.as_prompt(ours.encode(text, allow_special=True)) == ids, repr(text)
        plain = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ours.encode_batch([text])[0] == plain, repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)


REFUSED = {
    "tokenizer_config.json: tokenizer_class: expected one of GPT2Tokenizer": {
        "config": {"tokenizer_class": "RobertaTokenizer"}
    },
    "tokenizer_config.json: auto_map": {"config": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
    "tokenizer_config.json: add_prefix_space: expected true or false": {"config": {"add_prefix_space": "yes"}},
    "tokenizer_config.json: extra_special_tokens: expected the text of a token": {
        "config": {"extra_special_tokens": True}
    },
    "tokenizer.json: expected added_tokens with an id each": {"fast": changed(added_tokens=True)},
    "tokenizer_config.json: eos_token: expected the text of a token": {"config": {"eos_token": {"content": 3}}},
    "the token '<x>' has id 300, but in transformers it has 290": {"config": {}, "added": {"<x>": 300}},
    "the token '<y>' has id 300, but": {"config": {"added_tokens_decoder": {"300": token("<y>")}}},
    "tokenizer.json: expected GPT-2's kind, without the normalizer NFC": {"fast": changed(normalizer={"type": "NFC"})},
    "tokenizer.json: post_processor: expected ByteLevel": {"fast": changed(post_processor={"type": "Other"})},
    "tokenizer.json: expected a post_processor of": {"fast": changed(post_processor={"type": "TemplateProcessing"})},
    "tokenizer.json: post_processor: expected ids of the vocabulary, found 999": {
        "fast": changed(post_processor=ROBERTA | {"cls": ["<s>", 999]})
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_settings_are_refused_by_name(tmp_path: Path, message: str) -> None:
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_folder(folder_of(tmp_path / "model", **REFUSED[message]))
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("vocab.txt", None), ("spiece.model", None), (None, "T5Tokenizer")])
def test_a_tokenizer_of_another_kind_is_refused_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, kind: str | None
) -> None:
    monkeypatch.delattr(Tokenizer, "gpt2")
    if name:
        (tmp_path / name).write_text("[PAD]\n[UNK]\n")
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for read in (Tokenizer.from_folder, lambda folder: read_tokenizer(folder, GPTConfig(vocab_size=50257))):
        with pytest.raises(TokenizerError, match=name or "tokenizer_class"):
            read(tmp_path)


def test_gpt2s_own_vocabulary_takes_the_settings_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    tokenizer = read_tokenizer(tmp_path, GPTConfig(vocab_size=50257))
    assert tokenizer.encode("a") == tokenizer.encode(" a")


# End tokens -----------------------------------------------------------------------------------------------------------

ENDS = Tokenizer(SMALL.ranks, {EOT: V - 1, "<|end|>": V, "</s>": V + 1})
END_FILES = {
    "one in all files": ([V], {"config.json": V, "generation_config.json": V, "tokenizer_config.json": "<|end|>"}),
    "several": ([V - 1, V, V + 1], {"generation_config.json": [V, V + 1, V - 1]}),
    "config.json only": ([V - 1, V], {"config.json": V}),
    "generation_config.json first": ([V], {"config.json": V - 1, "generation_config.json": V}),
    "generation_config.json instead of the tokenizer's": (
        [V],
        {"generation_config.json": V, "tokenizer_config.json": "</s>"},
    ),
    "generation_config.json, a word": (
        [5],
        {"generation_config.json": 5, "tokenizer_config.json": "</s>"},
    ),
    "generation_config.json without one": (
        [V],
        {"config.json": V, "generation_config.json": None, "tokenizer_config.json": "<|end|>"},
    ),
    "tokenizer_config.json only": ([V - 1, V + 1], {"config.json": V - 1, "tokenizer_config.json": "</s>"}),
    "an id without a token": ([V - 1], {"config.json": 50256}),
}


def end_folder(path: Path, files: dict[str, Any]) -> Path:
    """Save a model that always generates id V, with these end tokens."""
    mx.random.seed(0)
    model = GPT(GPTConfig(vocab_size=V + 8, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    always = (mx.arange(V + 8) == V)[:, None]
    model.wte.weight = mx.where(always, mx.ones((V + 8, 16)), model.wte.weight * 0.1)
    model.ln_f.weight, model.ln_f.bias = model.ln_f.weight * 0, mx.ones((16,))
    save(model, ENDS, path)
    for name, value in files.items():
        content = json.loads((path / name).read_text()) if (path / name).exists() else {}
        key = "eos_token" if name.startswith("tokenizer") else "eos_token_id"
        (path / name).write_text(json.dumps(content | {key: value}))
    return path


@pytest.mark.parametrize("case", END_FILES)
def test_a_text_ends_at_every_end_token_and_a_saved_model_keeps_them(tmp_path: Path, case: str) -> None:
    ends, files = END_FILES[case]
    model, tokenizer = load(end_folder(tmp_path / "model", files))
    assert sorted(tokenizer.end_ids) == ends
    for settings in ({}, {"beams": 2}, {"draft": "lookup"}):
        text = "".join(generate(model, tokenizer, "the", temperature=0, max_tokens=3, **settings))
        assert text == ("" if V in ends else "<|end|>" * 3), settings
    save(model, tokenizer, tmp_path / "again")
    assert sorted(load(tmp_path / "again")[1].end_ids) == ends


@pytest.mark.parity
@pytest.mark.parametrize("case", END_FILES)
def test_transformers_and_mlx_lm_end_a_saved_model_at_the_same_tokens(tmp_path: Path, case: str) -> None:
    transformers, mlx_lm = pytest.importorskip("transformers"), pytest.importorskip("mlx_lm")
    ends, files = END_FILES[case]
    save(*load(end_folder(tmp_path / "model", files)), tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.eos_token_id
    assert sorted(theirs if isinstance(theirs, list) else [theirs]) == ends
    assert sorted(mlx_lm.load(str(tmp_path / "again"))[1].eos_token_ids) == ends


@pytest.mark.parametrize("end", ["</s>", "<|end|>", "<eos>"])
def test_an_end_token_of_another_name_is_found_in_the_vocabulary(tmp_path: Path, end: str) -> None:
    folder = folder_of(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({end if name == EOT else name: i for name, i in vocab.items()}))
    tokenizer = read_tokenizer(folder, GPTConfig(vocab_size=V))
    assert (tokenizer.end_ids, tokenizer.eot_id, tokenizer.vocab_size) == ((V - 1,), V - 1, V)


@pytest.mark.parametrize("wrong", ["</s>", 1.5, True, [[1]], {"a": 1}])
def test_an_end_token_that_is_no_id_is_refused(tmp_path: Path, wrong: Any) -> None:
    folder = folder_of(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id: expected an id or a list of ids"):
        Tokenizer.from_folder(folder)


def test_a_prompt_begins_with_bos_and_training_text_does(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config={"bos_token": "<s>", "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode_prompt("sea") == [V, *tokenizer.encode("sea")]
    assert (tokenizer.start_id, tokenizer.opening) == (V, (V,))


# Existing vocabularies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "tokenizer.json", "vocab.json", "merges.txt"])
def test_a_tokenizer_is_loaded_from_a_folder_or_its_file(tmp_path: Path, given: str) -> None:
    SMALL.save(tmp_path)
    assert make_tokenizer(str(tmp_path / given), []).hash == SMALL.hash


def test_a_tokenizer_file_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", lambda c: c["pre_tokenizer"].update(add_prefix_space=True))
    (folder / "tokenizer.json").rename(tmp_path / "mine.json")
    tokenizer = make_tokenizer(str(tmp_path / "mine.json"), [])
    assert tokenizer.encode("sea") == SMALL.encode(" sea")


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(TokenizerError, match=r"expected a folder or a tokenizer\.json, found another file"):
        make_tokenizer(str(tmp_path / "x.model"), [])
    with pytest.raises(TokenizerError, match=r"x\.model: expected a tokenizer of GPT-2's kind"):
        make_tokenizer(str(tmp_path), [])
    with pytest.raises(UsageError, match="unknown tokenizer"):
        make_tokenizer(str(tmp_path / "nowhere"), [])
