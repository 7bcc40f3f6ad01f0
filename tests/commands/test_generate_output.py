"""The output of ``mlx-gpt generate`` for programs and terminals, and what it reports on stderr."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from math import exp, log
from pathlib import Path

import pytest
from helpers.command_line import in_a_process, the_line
from helpers.generate_command import FEW, TOKENIZER, expected, piped, shown

from mlx_gpt import device
from mlx_gpt.cli import main
from mlx_gpt.commands.generation_flags import (
    as_row,
    legend,
    surprise_style,
    watched,
    write,
)
from mlx_gpt.generate.generation import Generation, generate_many
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.writer import Piece, Token
from mlx_gpt.store.folder import load


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
        assert list(watched(pieces())) == [1, 2, 3]
    assert capsys.readouterr().err.count("the first text takes longer than 0.1 s") == lines


def test_ctrl_c_ends_the_text_where_its_exception_is_dropped() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        with suppress(KeyboardInterrupt):  # as MLX does while it converts an argument
            signal.raise_signal(signal.SIGINT)
        yield 2

    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(watched(pieces()))
    assert seen == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
