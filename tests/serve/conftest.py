"""A model folder for the tests of the server."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mx.random.seed(0)
    config = GPTConfig(vocab_size=260, n_positions=2048, n_embd=16, n_layer=1, n_head=1, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save(GPT(config), Tokenizer.bytes(), folder)
    return folder
