"""``mlx-gpt lens``: views of a text on a terminal, as JSON and as plots, files, and errors in one line."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import SMALL, check_error, everything, in_a_process, the_line

from mlx_gpt.cli import main
from mlx_gpt.lens import trace
from mlx_gpt.lens.views import VIEWS
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import convert, load, save
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.tokenizer import Tokenizer

TEXT = "a tall tree"
LENS = ["lens", "model", TEXT]
PATCH = [*LENS, "--view", "patch", "--corrupted", "a tall wall", "--answer", "x", "--wrong", "y"]
CIRCUITS = ["lens", "model", "--view", "circuits", "--layer", "0", "--head", "1"]
COMMANDS = {name: [*LENS, "--view", name] for name in VIEWS} | {"patch": PATCH, "circuits": CIRCUITS}


def shown(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict:
    return json.loads(shown(capsys, [*arguments, "--json"]))


def piped(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8"))


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_printed_as_tables_and_as_json(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(here)
    text, found = shown(capsys, COMMANDS[name]), as_json(capsys, COMMANDS[name])
    assert "\x1b" not in text
    assert found["title"] in text
    for table in found["tables"]:
        assert table["title"] in text
        assert np.shape(table["values"]) == tuple(table["shape"])
    assert found["view"] == name
    assert found["ids"] == ([] if name == "circuits" else Tokenizer.bytes().encode(TEXT))
    assert everything(here) == before


def test_attention_is_the_default_view(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, LENS) == as_json(capsys, COMMANDS["attention"])


def test_the_numbers_are_those_of_the_trace(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, [*LENS, "--layer", "1", "--head", "0"])
    model, _ = load("model")
    pattern = trace(model, [found["ids"]], names="blocks.1.attn.hook_pattern")[1]["blocks.1.attn.hook_pattern"]
    values = np.array(found["tables"][0]["values"], dtype=float)
    np.testing.assert_allclose(np.nan_to_num(values), np.array(pattern[0, 0]), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        ("--layer 0 --head 0", "pattern of L0H0, in percent"),
        ("--layer 1 --head 0 --scores", "scores of L1H0"),
        ("--view heads --ablate mean", "heads"),
        ("--view neurons --top 1 --answer x --wrong y", "neurons"),
    ],
)
def test_flags_reach_the_view(flags: str, title: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert title in [table["title"] for table in as_json(capsys, [*LENS, *flags.split()])["tables"]]


def test_flags_of_patching_reach_the_view(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, [*PATCH, "--part", "mlp_out"])["tables"][0]["title"].startswith("mlp_out")
    assert "estimated by gradients" in as_json(capsys, [*PATCH, "--estimate"])["reading"]
    assert as_json(capsys, [*PATCH, "--path", "L0H1", "L1H0"])["tables"][0]["columns"] == ["queries", "keys", "values"]


@pytest.mark.parametrize("arguments", [["-"], [], ["--text", "-"], ["--text", TEXT]], ids=" ".join)
def test_the_text_may_be_a_flag_or_come_from_a_pipe(
    arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = as_json(capsys, LENS)
    piped(monkeypatch, f"{TEXT}\n")
    assert as_json(capsys, ["lens", "model", *arguments]) == expected


def test_special_tokens_are_read_as_generate_reads_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = {}
    for flag in ("--special", "--no-special"):
        assert main(["lens", "model", "a<|endoftext|>b", flag, "--json"]) == 0
        ids[flag] = json.loads(capsys.readouterr().out)["ids"]
    tokenizer = Tokenizer.bytes()
    assert ids["--special"] == tokenizer.encode_prompt("a<|endoftext|>b")
    assert ids["--no-special"] == tokenizer.encode("a<|endoftext|>b")


@pytest.mark.parametrize("name", sorted(VIEWS.keys() - {"circuits"}))
def test_a_part_can_be_removed_in_every_view(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = as_json(capsys, COMMANDS[name])
    edited = as_json(capsys, [*COMMANDS[name], "--without", "L0MLP", "--without", "L0H1"])
    assert edited["title"].endswith(", without L0MLP and L0H1")
    assert edited["without"] == ["L0MLP", "L0H1"]
    assert edited["tables"] != plain["tables"]


def test_text_is_generated_with_and_without_a_part(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = as_json(capsys, [*LENS, "--without", "L0MLP", "--generate", "6"])["tables"][-1]
    assert table["rows"] == ["as it is", "without L0MLP"]
    assert table["shape"] == [2, 6]
    assert table["texts"][0] != table["texts"][1]


def test_a_plot_replaces_a_file_and_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plot.png").write_text("old")
    assert main([*LENS, "--out", "plot.png"]) == 0
    assert the_line(capsys.readouterr().err) == "plot.png: written"
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_diagram_is_written_and_no_view_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--diagram", "model.svg", "--to-scale", "--layer", "1", "--head", "1"]
    assert shown(capsys, [*LENS, *arguments]) == ""
    assert Path("model.svg").read_text().startswith("<svg")
    assert "pattern of L1H1" in shown(capsys, [*LENS, *arguments, "--view", "attention"])


def test_a_page_is_written_with_its_texts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LENS, "--page", "page.html", "--text", "a second text"]) == 0
    assert the_line(capsys.readouterr().err).startswith("page.html: living page")
    page = Path("page.html").read_text()
    assert page.startswith("<!")
    assert TEXT in page
    assert "a second text" in page


def test_characters_that_the_output_cannot_encode_are_replaced(here: Path) -> None:
    done = in_a_process(*LENS, "--view", "attribution", cwd=here, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "attribution of" in done.stdout


def test_control_characters_of_a_text_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07\u202e\x9b"
    found = shown(capsys, ["lens", "model", hostile, "--layer", "0", "--head", "0"])
    assert r"\x1b" in found
    assert not set("\x1b\x07\u202e\x9b") & set(found)
    found = shown(capsys, ["lens", "model", hostile, "--generate", "8", "--without", "L0H0"])
    assert all(character.isprintable() for character in found if character != "\n")


def test_a_quantized_model_has_every_view(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(GPT(replace(SMALL, n_embd=64)), Tokenizer.bytes(), here / "wide")
    convert(find_source("wide"), here / "quantized", None, 8)
    for name, (_, _, *arguments) in COMMANDS.items():
        assert as_json(capsys, ["lens", "quantized", *arguments])["view"] == name


def test_a_stdin_that_stays_open_is_not_read_where_no_text_is_needed(here: Path) -> None:
    read, write = os.pipe()
    try:
        done = in_a_process(*CIRCUITS, cwd=here, stdin=read)
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0
    assert "circuits of L0H1" in done.stdout


WRONG: list[tuple[list[str], int, str]] = [
    ([*LENS, "--view", "atention"], 2, "--view atention: expected one of attention, logit-lens, attribution, heads"),
    ([*LENS, "--view", "atention"], 2, "; did you mean attention?"),
    ([*LENS, "--view", "logit-lens", "--layer", "0"], 2, "--layer has no effect with --view logit-lens"),
    ([*LENS, "--to-scale"], 2, "--to-scale has no effect without --diagram"),
    ([*LENS, "--diagram", "a.svg", "--json"], 2, "--json has no effect without --view"),
    ([*LENS, "--page", "a.html", "--without", "L0H0"], 2, "--without has no effect without --view"),
    ([*CIRCUITS, "--without", "L0H0"], 2, "--without has no effect with --view circuits"),
    ([*LENS, "--view", "patch"], 2, "--view patch needs --corrupted"),
    ([*LENS, "--view", "circuits"], 2, "--view circuits needs --layer and --head"),
    ([*LENS, "--layer", "2"], 2, "layer must be between 0 and 1, not 2"),
    ([*LENS, "--layer", "1", "--head", "-1"], 2, "head must be between 0 and 1, not -1"),
    ([*LENS, "--head", "1"], 2, "a head is one of a layer; give the layer too"),
    ([*LENS, "--diagram", "a.svg", "--layer", "2"], 2, "layer must be between 0 and 1, not 2"),
    (["lens", "model", ""], 2, "the text is empty; give one after the model, or - for stdin"),
    (["lens", "model", "--page", "a.html", "--text", ""], 2, "the text is empty"),
    ([*LENS, "--text", "b"], 2, "a view shows one text, not 2"),
    (["lens", "model", "a" * 33], 2, "the text is 33 tokens long and the model's context is 32; shorten it"),
    ([*LENS, "--view", "attribution", "--answer", "ab"], 2, "--answer 'ab' must be one token, not 2 (a, b)"),
    ([*LENS, "--view", "neurons", "--wrong", ""], 2, "--wrong '' must be one token, not 0 (none)"),
    ([*LENS, "--view", "neurons", "--top", "0"], 2, "at least 1 neuron is shown, not 0"),
    ([*LENS, "--view", "heads", "--ablate", "no"], 2, "a head is ablated by zero, mean or resample, not 'no'"),
    (["lens", "model", "a", "--view", "heads"], 2, "a loss needs a text of at least 2 tokens"),
    ([*PATCH, "--part", "z"], 2, "what is patched is one of resid_pre, attn_out, mlp_out, not 'z'"),
    ([*PATCH, "--estimate", "--path", "L0H0", "L1H0"], 2, "a path is not estimated; leave out one of the two"),
    ([*LENS, "--view", "patch", "--corrupted", "b"], 2, "must have as many tokens as the text, 11, not 1"),
    ([*LENS, "--view", "patch", "--corrupted", TEXT], 2, "answer and wrong answer are the same token"),
    ([*LENS, "--without", "L0H2"], 2, "head must be between 0 and 1, not 2"),
    ([*LENS, "--without", "blocks.0.hook_mlp_ot"], 2, "the closest is 'blocks.0.hook_mlp_out'"),
    ([*LENS, "--generate", "0"], 2, "--generate must be 1 or above, not 0"),
    (["lens", "model", "a" * 32, "--generate", "2"], 2, "which fills the model's context; shorten it"),
    ([*LENS, "--out", "plot.jpg"], 2, "plot.jpg: a plot's name ends in .png, .pdf, .svg, not .jpg"),
    ([*LENS, "--out", "plot"], 2, "plot: a plot's name ends in .png, .pdf, .svg, and this in none"),
    ([*LENS, "--out", "no/plot.png"], 2, "--out no/plot.png: there is no folder no; create it"),
    ([*LENS, "--page", "model"], 2, "--page 'model': expected a file, found a folder"),
    ([*LENS, "--diagram", "/dev/null"], 2, "cannot be written (a device or a pipe, not a regular file)"),
    (["lens", "model", "a\udcff"], 1, "the prompt: expected text in UTF-8, found other bytes"),
    ([*LENS, "--view", "patch", "--corrupted", "a\udcff"], 1, "the prompt: expected text in UTF-8"),
    (["lens", "text.txt", TEXT], 1, "text.txt: expected a model folder or a file of weights"),
    (["lens", "./nowhere", TEXT], 1, "./nowhere: no such folder, and not a hub id"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=lambda part: ascii(part)[-60:])
def test_an_error_is_one_line_and_leaves_no_files(
    arguments: list[str], code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_error(arguments, code, message, here, capsys)


def test_no_text_is_an_error_where_one_is_needed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "")
    check_error(["lens", "model"], 2, "the text is empty; give one after the model, or - for stdin", here, capsys)
