"""``mlx-gpt generate``: flags, output for programs and terminals, and errors."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from math import exp, inf, log
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.command_line import SMALL, everything, in_a_process, the_line

from mlx_gpt import device
from mlx_gpt.cli import main, parse
from mlx_gpt.commands.generate import Generate
from mlx_gpt.commands.generation_flags import (
    as_row,
    legend,
    load_quantized,
    surprise_style,
    with_slow_start_reported,
    write,
)
from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.generation import Generation, generate, generate_many
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.writer import Piece, Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
FEW = ["generate", "model", "--max-tokens", "12", "--seed", "3"]


class Stdin(io.TextIOWrapper):
    """Standard input from a pipe."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="utf-8")


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(content))


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return stdout, by default without the figures, whose measurement takes a second."""
    figures = [] if "--json" in flags else ["--no-figures"]
    few = FEW[:4] if "--beams" in flags else FEW  # without a seed
    assert main([*few, *flags, *figures]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def expected(prompt: str, **settings: Any) -> str:
    model, tokenizer = load("model")
    return "".join(generate(model, tokenizer, prompt, **({"max_tokens": 12, "seed": 3} | settings))) + "\n"


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


# Output


def test_samples_are_printed_in_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load("model")
    texts = generate_many(model, tokenizer, ["ab"] * 3, max_tokens=12, seed=3)
    assert len(set(texts)) == 3
    assert shown(capsys, "--prompt", "ab", "--samples", "3") == "\n---\n".join(texts) + "\n"


def test_json_lines_hold_tokens_texts_and_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--prompt", "ab", "--json", "--logprobs", "2", "--samples", "2")
    *rows, figures = [json.loads(line) for line in out.splitlines()]
    assert capsys.readouterr().err == ""
    model, tokenizer = load("model")
    run = Generation(
        model, tokenizer, [TOKENIZER.encode("ab")] * 2, GenerationSettings(max_tokens=12, seed=3, logprobs=2)
    )
    pieces = list(run)
    for sample in range(2):
        mine = [row for row in rows if row["sample"] == sample]
        *tokens, end = mine
        wanted = [piece for row, piece in pieces if row == sample]
        assert [row["text"] for row in tokens] == [piece.text for piece in wanted]
        for row, piece in zip(tokens, wanted, strict=True):
            if piece.token:
                assert row["id"] == piece.token.id
                assert row["logprob"] == pytest.approx(piece.token.logprob)
                assert [(one["id"], one["logprob"]) for one in row["top"]] == [
                    (i, pytest.approx(logprob)) for i, logprob in piece.token.top
                ]
                assert row["top"][0]["token"] == TOKENIZER.decode([row["top"][0]["id"]])
        assert end == {"sample": sample, "end": run.reasons[sample], "text": "".join(p.text for p in wanted)}
    assert figures["figures"].keys() >= {"prompt_tokens", "tokens_per_second", "peak_memory_bytes"}
    assert figures["figures"]["prompt_tokens"] == 4
    assert "figures" not in shown(capsys, "--json", "--no-figures", "--prompt", "a")


def test_logprobs_print_a_line_per_token_with_the_alternatives(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--prompt", "ab", "--logprobs", "3").splitlines()
    assert len(lines) == 12
    for line in lines:
        probability, token, *top = re.findall(r"\S+", line)
        assert re.fullmatch(r"\d+\.\d\d%", probability), line
        assert re.match(r"\"|b'", token), line
        assert len([word for word in top if re.fullmatch(r"\d+\.\d%", word)]) == 3, line


def test_a_row_shows_spaces_bytes_and_unknown_ids() -> None:
    space, half = TOKENIZER.ranks[b" "], TOKENIZER.ranks[b"\xc3"]
    token = Token(space, log(0.5), ((space, log(0.5)), (half, log(0.25)), (300, log(0.125))))
    assert (
        as_row(Piece(" ", token), TOKENIZER) == ' 50.00%  " "               50.0% " "  25.0% b\'\\xc3\'  12.5% id 300\n'
    )
    assert as_row(Piece("\ufffd", None), TOKENIZER) == ""


def test_colours_show_the_surprise(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(bits: float, text: str = "x") -> str:
        write(text, surprise_style(Piece(text, Token(0, -bits * log(2)))))
        return capsys.readouterr().out

    assert of(1.9) == "x"
    assert len({of(bits) for bits in (1, 3, 5, 8, 12, 100)}) == 5
    assert of(12, "a\nb").count("\x1b[0m\n") == 1  # no colour runs to the end of a line
    assert re.sub(r"\x1b\[[\d;]*m", "", of(12, "a\n\nb")) == "a\n\nb"
    text = shown(capsys, "--prompt", "ab", "--colour")
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == expected("ab")
    assert "\x1b[" in text
    assert "2 to 4" in legend()


@pytest.mark.parametrize("flags", [[], ["--colour"], ["--samples", "2"], ["--logprobs", "2"], ["--json"]], ids=" ".join)
def test_control_characters_reach_a_pipe_but_no_terminal(
    flags: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    biases = [("--logit-bias", str(TOKENIZER.ranks[byte]), "1000") for byte in (b"\x1b", b"\x7f")]
    flags = [*flags, "--prompt", "a", *biases[0], *biases[1], "--no-figures"]
    piped = shown(capsys, *flags)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    seen = re.sub(r"\x1b\[[\d;]*m", "", shown(capsys, *flags))  # without the colours
    assert not {"\x1b", "\x7f"} & set(seen)
    if not {"--json", "--colour"} & set(flags):
        assert seen == piped.replace("\x1b", r"\x1b").replace("\x7f", r"\x7f") != piped


def test_figures_end_the_run_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--prompt", "abc"]) == 0
    line = the_line(capsys.readouterr().err)
    assert re.fullmatch(
        r"prompt of 3: [\d.]+ tokens/s; text: [\d.]+ tokens/s, \d+% of this machine's memory speed \([\d.]+ GB/s\); "
        r"peak memory [\d,]+ MiB",
        line,
    )


def test_a_full_context_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "model", "--prompt", "abc", "--no-figures", "--min-tokens", "60", "--max-tokens", "60"]
    assert main(flags) == 0
    shown = the_line(capsys.readouterr().err)
    assert shown == "the text ends where the model's context of 32 tokens is full; --context slide continues"
    assert main([*flags, "--context", "slide"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", ["flag", "file", "pipe"])
def test_a_context_that_slides_reports_a_longer_prompt_and_reads_its_end(
    source: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "".join(chr(97 + i % 7) for i in range(75))
    Path("prompt.txt").write_text(prompt)
    piped(monkeypatch, prompt.encode())
    given = {"flag": ["--prompt", prompt], "file": ["--prompt-file", "prompt.txt"], "pipe": []}[source]
    assert main([*FEW, "--no-figures", "--context", "slide", *given]) == 0
    found = capsys.readouterr()
    assert the_line(found.err) == "the prompt does not fit into the model's context of 32 tokens: its last 31 are read"
    assert found.out == expected(prompt[-31:], context="slide")
    piped(monkeypatch, prompt.encode())
    assert main([*FEW, *given]) == 2
    assert "75 tokens long and the model's context is 32" in the_line(capsys.readouterr().err)


def test_a_saved_prompt_that_no_longer_fits_is_read_again_from_its_end(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "--prompt", "ab" * 10, "--save-prompt-cache", "kept", "--max-tokens", "0")
    flags = ["--prompt-cache", "kept", "--prompt", "cd" * 10, "--context", "slide"]
    assert shown(capsys, *flags) == expected(("ab" * 10 + "cd" * 10)[-31:], context="slide")


def test_characters_outside_the_encoding_are_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "ab", "--max-tokens", "20"]
    plain = shown(capsys, *flags)
    ascii_only = in_a_process(*FEW, *flags, "--no-figures", cwd=here, env={"PYTHONIOENCODING": "ascii"})
    assert not plain.isascii()
    assert ascii_only.stderr == ""
    assert ascii_only.stdout == plain.encode("ascii", "replace").decode()


# Less memory, less time


def wide(seed: int, vocab_size: int = 257, **shape: Any) -> GPT:
    mx.random.seed(seed)
    return GPT(replace(SMALL, n_embd=64, vocab_size=vocab_size, **shape))


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


# Bad input

WRONG: list[tuple[str, int, str]] = [
    ("--top-p 0", 2, "--top-p must be above 0 and at most 1 (off), not 0.0"),
    ("--top-p 2", 2, "--top-p must be above 0 and at most 1 (off), not 2.0"),
    ("--stop ''", 2, "--stop must be texts of at least one character"),
    ("--logit-bias 300 1", 2, "--logit-bias: no token has id 300; the vocabulary's ids are 0 to 256"),
    ("--logit-bias -1 1", 2, "--logit-bias: no token has id -1"),
    ("--ban yes --force yes", 2, "--force 'yes' contradicts --ban or --logit-bias"),
    ("--max-tokens 2 --min-tokens 3", 2, "--min-tokens 3 is more than max-tokens 2"),
    ("--samples 0", 2, "--samples must be 1 or above, not 0"),
    ("--colour --json", 2, "--colour shows the text, --logprobs and --json show each token; take one of them"),
    ("--prompt-file text.txt", 2, "--prompt and --prompt-file both give the prompt; take one of them"),
    ("--quantize 3", 2, "weights can be quantized to 8 or 4 bits, not 3"),
    ("--quantize 4", 2, "weights are quantized in groups of 64"),
    ("--cache-bits 5", 2, "--cache-bits must be 16"),
    ("--draft-model other", 2, "--draft-model other has another vocabulary (258 ids) than model (257)"),
    ("--draft-model nowhere", 1, "nowhere: no such folder"),
    ("--draft-model model --prompt-lookup", 2, "both propose tokens; take one of them"),
    ("--draft-model model --samples 2", 2, "a draft is for one prompt at a time"),
    ("--beams 2 --samples 2", 2, "--beams gives the best text of one prompt, without --samples; leave out one"),
    ("--beams 3 --temperature 0.8", 2, "--temperature has no effect with --beams, which draws nothing; remove one"),
    ("--beams 3 --top-k=5", 2, "--top-k has no effect with --beams"),
    ("--beams 3 --seed 1", 2, "--seed has no effect with --beams"),
    ("--length-penalty 1", 2, "--length-penalty has no effect without --beams above 1; remove one"),
    ("--temperature 0 --min-p 0.1", 2, "--min-p has no effect with --temperature 0; remove one"),
    ("--guesses 4", 2, "--guesses has no effect without --draft-model or --prompt-lookup; remove one"),
    ("--prompt-cache none", 1, "none: expected a prompt cache, found no such file; save one with --save-prompt-cache"),
    ("--prompt-cache model", 1, "model: expected a prompt cache, found a folder; save one"),
    ("--prompt-cache ''", 1, "expected a prompt cache, found a folder; save one"),
    ("--save-prompt-cache model", 2, "--save-prompt-cache 'model': expected a file, found a folder; give a name in it"),
    ("--save-prompt-cache ''", 2, "--save-prompt-cache '': expected a file, found a folder"),
    ("--save-prompt-cache pipe", 2, "--save-prompt-cache pipe: cannot be written (a device or a pipe, not a regular"),
    ("--save-prompt-cache k --prompt " + "a" * 40, 2, "takes a prompt of at most 31 tokens, not 40; shorten it"),
    ("--prompt-cache kept", 2, "kept: this prompt was read by another model"),
    ("--prompt-cache mine --cache-bits 16", 2, "--cache-bits 16 differs from the file of --prompt-cache"),
    ("--prompt-cache text.txt", 1, "text.txt: expected a whole safetensors file"),
    ("--save-prompt-cache k --context slide", 2, "leave out one"),
    ("--save-prompt-cache no/such/file", 2, "--save-prompt-cache no/such/file: there is no folder no/such; create it"),
    ("--revision v1", 1, "a revision ('v1') names a version on the hub, but this is a folder"),
]


@pytest.mark.parametrize(("flags", "code", "message"), WRONG, ids=lambda part: str(part)[:40])
def test_invalid_flags_are_refused_in_one_line(
    flags: str, code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cache in (("another", "kept"), ("model", "mine")):
        if cache in flags:
            save(wide(1), TOKENIZER, "another")
            assert main(["generate", name, "--prompt", "x", "--save-prompt-cache", cache, "--max-tokens", "0"]) == 0
    if "other" in flags:
        save(wide(1, 258), Tokenizer.train(["aab"] * 9, 258), "other")
    if "pipe" in flags:
        os.mkfifo("pipe")
    before = everything(here)
    capsys.readouterr()
    assert main(["generate", "model", "--prompt", "a", "--no-figures", *shlex.split(flags)]) == code
    assert message in the_line(capsys.readouterr().err)
    assert everything(here) == before


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


def test_a_prompt_flag_that_is_not_utf8_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--prompt", "caf\udce9!"]) == 1
    assert "expected text in UTF-8" in the_line(capsys.readouterr().err)


def test_a_missing_prompt_file_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--prompt-file", "nowhere.txt"]) == 1
    assert the_line(capsys.readouterr().err) == "nowhere.txt: expected a file, found none"


def test_rules_that_forbid_all_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for i in range(257) for flag in ("--logit-bias", str(i), "-inf")]
    assert main([*FEW, "--prompt", "a", *flags]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == "mlx-gpt: all tokens are masked by --logit-bias; relax one of them"


def test_probabilities_sum_to_one_over_all_alternatives(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--prompt", "a", "--json", "--logprobs", "1000", "--max-tokens", "1", "--no-figures")
    assert sum(exp(one["logprob"]) for one in json.loads(out.splitlines()[0])["top"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("on_a_mac", "seconds", "lines"), [(True, 0.3, 1), (True, 0.0, 0), (False, 0.3, 0)])
def test_on_a_mac_the_first_text_that_starts_slowly_is_reported(
    on_a_mac: bool, seconds: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "ON_A_MAC", on_a_mac)
    monkeypatch.setattr(device, "SLOW", 0.1)
    monkeypatch.setattr(device, "begun", set())

    def pieces() -> Iterator[int]:
        yield 1  # the prompt's token; the compiled step follows
        time.sleep(seconds)
        yield 2
        time.sleep(0.2)
        yield 3

    for _ in range(2):  # once in a process
        assert list(with_slow_start_reported(pieces())) == [1, 2, 3]
    assert capsys.readouterr().err.count("the first text takes longer than 0.1 s") == lines
