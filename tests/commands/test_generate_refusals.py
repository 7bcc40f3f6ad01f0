"""``mlx-gpt generate`` refuses invalid flags and prompts in one line, and changes nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from helpers.command_line import everything, the_line
from helpers.generate_command import FEW, TOKENIZER, wide

from mlx_gpt.cli import main
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

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
