"""A refused command ends with one line that has a remedy, and leaves no files behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from helpers.command_line import SMALL, TRAIN, check_error, everything, the_line
from helpers.loopback_hub import NOWHERE, connect, running

from mlx_gpt.cli import main, parse
from mlx_gpt.commands.generate import Generate
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.terminal import escaped
from mlx_gpt.text.tokenizer import Tokenizer


def nothing(here: Path) -> None:
    pass


def no_config(here: Path) -> None:
    (here / "model/config.json").unlink()


def other_config(here: Path) -> None:
    config = json.loads((here / "model/config.json").read_text())
    (here / "model/config.json").write_text(json.dumps(config | {"n_layer": 3}))


def empty_weights(here: Path) -> None:
    (here / "model/model.safetensors").write_bytes(b"")


def cut_weights(here: Path) -> None:
    file = here / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty_text(here: Path) -> None:
    (here / "text.txt").write_text("")


def short_text(here: Path) -> None:
    (here / "text.txt").write_text("too short")


def quantized(here: Path) -> None:
    save(GPT(replace(SMALL, n_embd=64)), Tokenizer.bytes(), here / "wide")
    with redirect_stderr(StringIO()):
        assert main(["convert", "wide", "packed", "--quantize", "4"]) == 0


def earlier_run(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run/metrics.jsonl").write_text("{}\n")


def settings(text: str) -> Callable[[Path], None]:
    def settings(here: Path) -> None:
        (here / "my.toml").write_text(text)

    return settings


def pipe(here: Path) -> None:
    os.mkfifo(here / "my.toml")


GENERATE = ["generate", "./model"]
NO_DATA = ["train", "--data", "no.txt", "--out", "run"]
FROM_FILE = [*TRAIN, "--config", "my.toml"]
OTHER_FLAGS = [*FROM_FILE[:-4], "--config", "my.toml"]  # without --steps
ITS_OWN = ["--n-positions", "32", "--n-layer", "2"]  # as the model has them

WRONG: list[tuple[Callable[[Path], None], list[str], int, str]] = [
    # Files and data: exit code 1
    (nothing, ["generate", "./nowhere"], 1, "./nowhere: no such folder, and not a hub id"),
    (nothing, ["generate", "text.txt"], 1, "text.txt: expected a model folder or a file of weights"),
    (no_config, GENERATE, 1, "config.json: expected a settings file, but it cannot be read"),
    (other_config, GENERATE, 1, "h.2.ln_1.weight: expected shape (16,), found no such tensor (and 11 more like it)"),
    (empty_weights, GENERATE, 1, "model.safetensors: expected a whole safetensors file, found 0 bytes"),
    (cut_weights, GENERATE, 1, "bytes where its header promises"),
    (nothing, NO_DATA, 1, "no.txt: expected text, found no such file, folder or glob"),
    (empty_text, TRAIN, 1, "expected text for training and for validation, found none for training; use more"),
    (short_text, TRAIN, 1, "the text is shorter than one window: "),
    (nothing, [*TRAIN, "--init", "./nowhere"], 1, "./nowhere: no such folder, and not a hub id"),
    (
        quantized,
        ["train", "--data", "text.txt", "--out", "run", "--init", "packed"],
        1,
        "packed: is quantized already, to 4 bits; start from the",
    ),
    # Usage: exit code 2
    (nothing, [*GENERATE, "--temperature", "-0.5"], 2, "--temperature must be 0 (greedy) or above, not -0.5"),
    (
        nothing,
        ["generate", "./nowhere", "--top-p", "2"],
        2,
        "--top-p must be above 0 and at most 1",
    ),  # checked before the folder
    (nothing, [*GENERATE, "--top-k", "-1"], 2, "--top-k must be 0 (off) or a number of ids, not -1"),
    (nothing, [*GENERATE, "--max-tokens", "-1"], 2, "--max-tokens must be 0 or above, not -1"),
    (nothing, [*GENERATE, "--seed", "-1"], 2, "--seed must be 0 or above"),
    (
        nothing,
        [*GENERATE, "--prompt", "a" * 32],
        2,
        "32 tokens long and the model's context is 32; shorten it to at most",
    ),
    (nothing, ["quickstart", "--minutes", "0"], 2, "--minutes must be between 0.2 and 1440, not 0"),
    (nothing, ["quickstart", "--minutes", "nan"], 2, "--minutes must be between 0.2 and 1440, not nan"),
    (nothing, ["quickstart", "--seed", "-1"], 2, "--seed must be 0 or above and below 2^64, not -1"),
    (nothing, [*TRAIN, "--preset", "huge"], 2, "unknown preset 'huge'; choose one of: gpt2, gpt2-medium, gpt2-large"),
    (nothing, [*TRAIN, "--n-head", "3"], 2, "n_embd must be a multiple of n_head"),
    (nothing, [*TRAIN, "--steps", "0"], 2, "--steps must be at least 1, not 0"),
    (
        nothing,
        [*TRAIN, "--tokens", "9"],
        2,
        "give one of --steps, --tokens, --epochs, not --steps and --tokens",
    ),
    (nothing, [*TRAIN, "--learning-rate", "-1"], 2, "--learning-rate must be a number above 0, not -1.0"),
    (nothing, [*TRAIN, "--seed", str(2**64)], 2, "--seed must be 0 or above and below 2^64, not 18446744073709551616"),
    (nothing, [*TRAIN, "--patience", "2", "--eval-every", "0"], 2, "--patience needs validation losses: give --eval"),
    (
        nothing,
        [*TRAIN, "--muon-iterations", "3", "--optimizer", "adamw"],
        2,
        "--muon-iterations has no effect without --o",
    ),
    (nothing, [*TRAIN, "--init", "model", *ITS_OWN, "--muon-embeddings"], 2, "--muon-embeddings has no effect without"),
    (nothing, [*TRAIN, "--prompt", "a", "--eval-every", "0"], 2, "--prompt has no effect with --eval-every 0; remove"),
    (
        nothing,
        [*TRAIN, "--eval-windows", "3", "--eval-every", "0"],
        2,
        "--eval-windows has no effect with --eval-every 0",
    ),
    (nothing, [*TRAIN, "--tokenizer", "words"], 2, "unknown tokenizer 'words'; choose gpt2, bytes, or bpe:N"),
    (nothing, [*TRAIN, "--tokenizer", "bpe:9999"], 2, "the text is too small for a vocabulary of 9999 ids"),
    (nothing, [*TRAIN, "--prompt", "a" * 16], 2, "the prompt is 16 tokens long and the model's context is 16"),
    (earlier_run, TRAIN, 2, "--out run exists already; choose a new folder"),
    (nothing, ["train", "--data", "text.txt", "--out", "text.txt/run"], 2, "text.txt is not a folder; choose another"),
    (nothing, [*TRAIN, "--init", "model"], 2, "--n-positions 16 (it has 32), --n-layer 1 (it has 2)"),
    (
        nothing,
        ["train", "--data", "text.txt", "--out", "run", "--init", "model", "--tokenizer", "bpe:300"],
        2,
        "--init model sets architecture and tokenizer; remove --tokenizer bpe:300",
    ),
    (nothing, FROM_FILE, 2, "my.toml: expected the settings of a run, but it cannot be read (No such file"),
    (settings("steps ="), FROM_FILE, 2, "my.toml: expected settings as TOML, found something else"),
    (settings("step = 3"), FROM_FILE, 2, "my.toml: unknown setting step; mlx-gpt train --help lists the names"),
    (settings("steps = " + 20_000 * "["), FROM_FILE, 2, "my.toml: expected settings as TOML, found something else"),
    (
        settings(" " * (1 << 20) + "steps = 1"),
        FROM_FILE,
        2,
        "my.toml: expected the settings of a run, but it cannot be",
    ),
    (pipe, FROM_FILE, 2, "it cannot be read (not a file but a device or a pipe)"),
    (settings("steps = [3]"), OTHER_FLAGS, 2, "my.toml: steps must be one value (int), not [3]"),
    (settings("steps = true"), OTHER_FLAGS, 2, "my.toml: steps must be one value (int), not True"),
    (settings('learning_rate = "0.1"'), OTHER_FLAGS, 2, "my.toml: learning_rate must be one value (int or float), not"),
    (settings("recompute = 1"), OTHER_FLAGS, 2, "my.toml: recompute must be one value (bool), not 1"),
    (settings("prompt = 1979-05-27"), OTHER_FLAGS, 2, "my.toml: prompt must be one value (str), not datetime.date"),
    (settings('prompt = "\\u0000"'), OTHER_FLAGS, 2, "my.toml: prompt must be one value (str), not '\\x00'"),
    (
        settings("steps." + 9_000 * "a." + "b = 1"),
        OTHER_FLAGS,
        2,
        "my.toml: steps must be one value (int), not {'a': {",
    ),
    (
        nothing,
        ["train", "--resume", "nowhere"],
        2,
        "nowhere: expected the folder of a run to resume, found no run.toml",
    ),
    (earlier_run, ["train", "--resume", "run"], 2, "run: expected the folder of a run to resume, found no run.toml"),
    (nothing, ["train", "--resume", "run", "--out", "run2"], 2, "--resume continues a run in its own folder"),
]


@pytest.mark.parametrize(
    ("prepare", "arguments", "code", "message"), WRONG, ids=lambda part: getattr(part, "__name__", str(part)[:60])
)
def test_an_error_is_one_line_and_leaves_no_files(
    prepare: Callable[[Path], None],
    arguments: list[str],
    code: int,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(here)
    check_error(arguments, code, message, here, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "train, generate, "),
        (["walk"], "walk"),
        (["generate"], "MODEL"),
        ([*GENERATE, "--top", "3"], "--top"),
        (["train", "--out", "run"], "--data"),
        ([*TRAIN, "--n-layer", "few"], "few"),
        ([*TRAIN, "--preset"], "--preset"),
        ([*TRAIN, "--vocab-size", "300"], "--vocab-size"),  # set by the tokenizer
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_wrong_flag_is_reported_in_one_line(
    arguments: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(here)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"mlx-gpt: [^\n]*[^.]; see mlx-gpt.* --help\n", output.err)
    assert expected in output.err
    assert not output.out
    assert everything(here) == before


def test_control_characters_of_a_wrong_flag_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["\x1b[2Jx"], [*GENERATE, "\x1b]0;x\x07"], [*GENERATE, "--\x9b2J"]):
        assert main(wrong) == 2
        found = capsys.readouterr().err
        assert not {"\x1b", "\x07", "\x9b"} & set(found)
        assert escaped(wrong[-1]) in found
    right = parse(["generate", "m", "--prompt", "\x1b[2Jx"])
    assert isinstance(right, Generate)
    assert right.prompt == "\x1b[2Jx"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (True, "ada/gpt: no such folder here, and from the hub: no such model on the hub; check the spelling"),
        (False, "127.0.0.1:9 cannot be reached … connect to the internet, or give a folder"),
    ],
    ids=["no such model", "no network"],
)
def test_a_model_missing_on_the_hub_is_reported_in_one_line(
    network: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with running() as hub:  # without any model
        connect(hub.address if network else NOWHERE, tmp_path / "hub", monkeypatch)
        assert main(["generate", "ada/gpt"]) == 1
    output = capsys.readouterr()
    assert all(part in the_line(output.err) for part in message.split(" … "))  # … is the operating system's message
    assert not output.out
    assert not [path for path in (tmp_path / "hub").rglob("*.json") if path.is_file()]
