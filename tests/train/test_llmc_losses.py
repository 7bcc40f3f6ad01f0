"""llm.c's ten training losses, reproduced with GPT-2's weights; its batch is made from the text.

Needs GPT-2's folder from the hub: ``GPT2_FOLDER=weights/gpt2 python -m pytest tests/train/test_llmc_losses.py``. The
batch needs ``TINY_SHAKESPEARE=input.txt``, and ``GPT2_FOLDER`` or ``GPT2_TOKENIZER``, a folder with vocab.json and
merges.txt. Tests without their files are skipped.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gpt.check.published import compare, known_models
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer

SHA256 = "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"  # of the 257 ids as uint16


def path_from(*names: str) -> Path:
    """The path in the first of these environment variables that is set."""
    path = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if path is None:
        pytest.skip(f"set {' or '.join(names)} to run this")
    return Path(path)


def ten_losses() -> dict[str, Any]:
    (figure,) = (one for one in known_models()["gpt2"]["figures"] if one["kind"] == "training losses")
    return figure


def sections(text: str, tokenizer: Tokenizer) -> list[int]:
    """llm.c's ids of Tiny Shakespeare (dev/data/tinyshakespeare.py): <|endoftext|> before each section of the text."""
    parts = text.split("\n\n")
    whole = [part + "\n\n" for part in parts[:-1]] + parts[-1:]
    return [i for ids in tokenizer.encode_batch(whole) for i in (tokenizer.eot_id, *ids)]


def test_sections_are_the_text_with_an_end_of_text_token_before_each() -> None:
    tokenizer = Tokenizer.bytes()
    ids = sections("a\n\nb b\n\nc", tokenizer)
    assert tokenizer.decode(ids) == "<|endoftext|>a\n\n<|endoftext|>b b\n\n<|endoftext|>c"


def test_the_batch_is_the_beginning_of_the_validation_text_of_tiny_shakespeare() -> None:
    text = path_from("TINY_SHAKESPEARE").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_folder(path_from("GPT2_TOKENIZER", "GPT2_FOLDER"))
    ids = sections(text, tokenizer)[:257]  # validation is the first 32,768 ids
    assert hashlib.sha256(np.array(ids, "<u2").tobytes()).hexdigest() == SHA256
    assert ids == ten_losses()["ids"]


def test_the_losses_equal_those_of_llm_c() -> None:
    model, tokenizer = load(path_from("GPT2_FOLDER"))
    check = compare(model, tokenizer, ten_losses())
    assert check.holds, check
