"""``mlx-gpt generate`` in this process: its output, the text that is expected, a prompt from a pipe."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_gpt.cli import main
from mlx_gpt.generate.generation import generate
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer

from .command_line import SMALL

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


def wide(seed: int, vocab_size: int = 257, **shape: Any) -> GPT:
    mx.random.seed(seed)
    return GPT(replace(SMALL, n_embd=64, vocab_size=vocab_size, **shape))
