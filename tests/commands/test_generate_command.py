"""``mlx-gpt generate``: flags, prompts, prompt caches, drafts and smaller weights."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.command_line import SMALL, the_line
from helpers.generate_command import FEW, TOKENIZER, expected, piped, shown, wide

from mlx_gpt.cli import main, parse
from mlx_gpt.commands.generate import Generate
from mlx_gpt.commands.generation_flags import (
    load_quantized,
)
from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.generation import Generation, generate
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save

# Flags

FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("--max-tokens 7", {"max_tokens": 7}),
    ("--stop a --stop bc", {"stop": ("a", "bc")}),
    ("--context slide", {"context": "slide"}),
    ("--logit-bias 5 -inf --logit-bias 6 -1.5", {"logit_bias": {5: -inf, 6: -1.5}}),
    ("--repetition-penalty 1.2", {"repetition_penalty": 1.2}),
    ("--frequency-penalty 0.5 --presence-penalty -1", {"frequency_penalty": 0.5, "presence_penalty": -1.0}),
    ("--no-repeat-ngram 3", {"no_repeat_ngram": 3}),
    ("--ban no --ban 'not so'", {"ban": ("no", "not so")}),
    ("--force yes", {"force": ("yes",)}),
    ("--min-tokens 4", {"min_tokens": 4}),
    ("--temperature 0.5 --top-k 3 --top-p 0.9", {"temperature": 0.5, "top_k": 3, "top_p": 0.9}),
    ("--min-p 0.1 --typical-p 0.8 --seed 9", {"min_p": 0.1, "typical_p": 0.8, "seed": 9}),
    ("--beams 3 --length-penalty 2", {"beams": 3, "length_penalty": 2.0}),
    ("--cache-bits 8 --guesses 2", {"cache_bits": 8, "guesses": 2}),
    ("--logprobs 2", {"logprobs": 2}),
]


@pytest.mark.parametrize(("flags", "settings"), FLAGS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_flag_is_a_field_of_the_settings(flags: str, settings: dict[str, Any]) -> None:
    verb = parse(["generate", "m", *shlex.split(flags)])
    assert isinstance(verb, Generate)
    assert verb.settings() == GenerationSettings(**settings)


def test_every_setting_has_a_flag_with_the_same_default(capsys: pytest.CaptureFixture[str]) -> None:
    verb = parse(["generate", "m"])
    assert isinstance(verb, Generate)
    assert verb.settings() == GenerationSettings()
    tried = {name for _, settings in FLAGS for name in settings}
    of_serve = {"stop_token_ids", "ignore_eos"}
    assert tried == {field.name for field in fields(GenerationSettings)} - of_serve
    with pytest.raises(SystemExit):
        parse(["generate", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in tried if f"--{name.replace('_', '-')} " not in shown] == []
    for group in ("length", "constraints", "drawing", "search", "speed", "output"):
        assert f"{group} options" in shown


def test_flags_change_the_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flags, settings in FLAGS:
        if not {"cache_bits", "logprobs", "seed"} & settings.keys():
            texts[flags] = shown(capsys, "--prompt", "ab", *shlex.split(flags))
            assert texts[flags] == expected("ab", **settings)
    assert len(set(texts.values())) > 4


# The prompt


@pytest.mark.parametrize("content", ["héllo", "héllo\n", "héllo\r\n"])
def test_a_prompt_may_come_from_a_file_or_a_pipe(
    content: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = expected("héllo")
    assert shown(capsys, "--prompt", "héllo") == text
    Path("prompt.txt").write_bytes(content.encode())
    assert shown(capsys, "--prompt-file", "prompt.txt") == text
    for flags in ([], ["--prompt-file", "-"]):
        piped(monkeypatch, content.encode())
        assert shown(capsys, *flags) == text


def test_only_the_last_newline_of_a_prompt_is_removed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, b"a\n\n")
    assert shown(capsys) == expected("a\n") != expected("a")


def test_the_prompt_flag_takes_precedence_over_a_pipe(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, b"b")
    assert shown(capsys, "--prompt", "a") == expected("a") != expected("b")


def test_no_prompt_starts_a_new_text(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, b"")
    assert shown(capsys) == shown(capsys, "--prompt", "") == expected("")


def test_endoftext_in_the_prompt_is_the_special_token_unless_no_special(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FEW, "--no-figures", "--prompt", "a<|endoftext|>"]
    assert main([*flags, "--no-special"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert main(flags) == 0
    meant = capsys.readouterr()
    assert "separates documents, as in training; --no-special reads it as text" in the_line(meant.err)
    model, tokenizer = load("model")
    run = Generation(
        model, tokenizer, [[TOKENIZER.ranks[b"a"], TOKENIZER.eot_id]], GenerationSettings(max_tokens=12, seed=3)
    )
    assert meant.out == "".join(piece.text for _, piece in run) + "\n" != shown.out


@pytest.mark.parametrize(
    ("content", "text", "change"),
    [
        (b"caf\xe9!", "caf\ufffd!", "1 bytes were not UTF-8 and were replaced by U+FFFD"),  # Latin-1
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo", "byte order mark"),
        ("naïve".encode("utf-16"), "naïve", "byte order mark"),
        (b"a<|endoftext|>\nb", "a<|endoftext|>b", "<|endoftext|> in the prompt separates documents"),
    ],
)
@pytest.mark.parametrize("source", ["pipe", "file"])
def test_a_prompt_from_a_file_or_a_pipe_is_read_like_the_text_of_training(
    source: str, content: bytes, text: str, change: str, here: Path, monkeypatch: Any, capsys: Any
) -> None:
    piped(monkeypatch, content)
    Path("prompt").write_bytes(content)
    assert main([*FEW, "--no-figures", *(["--prompt-file", "prompt"] if source == "file" else [])]) == 0
    of_file = capsys.readouterr()
    assert change in of_file.err
    assert main([*FEW, "--no-figures", "--prompt", text, "--special"]) == 0
    assert capsys.readouterr().out == of_file.out


# Less memory, less time


def test_a_prompt_cache_is_saved_and_continued(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "0", "--max-tokens", "8"]
    whole = shown(capsys, "--prompt", "a longer text", *flags)
    shown(capsys, "--prompt", "a longer", "--save-prompt-cache", "kept", *flags)
    assert shown(capsys, "--prompt", " text", "--prompt-cache", "kept", *flags) == whole
    shown(capsys, "--prompt", "a longer", "--save-prompt-cache", "again", "--max-tokens", "0")
    assert Path("again").read_bytes() == Path("kept").read_bytes()
    shown(capsys, "--prompt", " text", "--prompt-cache", "kept", "--save-prompt-cache", "longer", *flags)
    assert shown(capsys, "--prompt", "", "--prompt-cache", "longer", *flags) == whole


def test_a_draft_does_not_change_greedy_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(GPT(replace(SMALL, n_layer=1)), TOKENIZER, "draft")
    plain = shown(capsys, "--prompt", "ab", "--temperature", "0")
    for flags in (["--draft-model", "draft"], ["--draft-model", "model"], ["--prompt-lookup", "--guesses", "2"]):
        assert shown(capsys, "--prompt", "ab", "--temperature", "0", *flags) == plain


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantized_weights_generate(bits: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_gpt.model.quantize import quantize

    save(wide(0), TOKENIZER, "model")
    model, tokenizer = load("model")
    text = "".join(generate(quantize(model, int(bits)), tokenizer, "ab", max_tokens=12, seed=3))
    assert shown(capsys, "--prompt", "ab", "--quantize", bits) == text + "\n"
    exact, rounded = (shown(capsys, "--prompt", "ab", "--logprobs", "0", *more) for more in ([], ["--quantize", bits]))
    assert exact != rounded


@pytest.mark.parametrize("kept", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_half_precision_is_kept_except_on_a_cpu(
    device: str, kept: mx.Dtype, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load("model", dtype=kept)
    save(model, TOKENIZER, "half")
    monkeypatch.setattr("mlx_gpt.device.on_cpu", lambda: device == "cpu")
    name = str(kept).removeprefix("mlx.core.")
    found = load_quantized("half")[0].wte.weight.dtype
    remark = capsys.readouterr().err
    assert found == (mx.float32 if device == "cpu" else kept)
    assert f"--dtype {name} keeps it" in remark if device == "cpu" else remark == ""
    assert load_quantized("half", dtype=name)[0].wte.weight.dtype == kept
    assert load_quantized("half", dtype="float32")[0].wte.weight.dtype == mx.float32
    assert load_quantized("model")[0].wte.weight.dtype == mx.float32


def test_logits_are_in_float32_whatever_the_weights_are(here: Path) -> None:
    model, _ = load("model", dtype=mx.bfloat16)
    decoder = Decoder(model)
    assert decoder.prefill(mx.array([[65, 66]])).dtype == mx.float32
    assert decoder.step(mx.array([[67]])).dtype == mx.float32
