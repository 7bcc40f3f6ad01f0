"""Greedy text is that of transformers and of mlx-lm, from the same folder, token by token; the parity extra."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation, generate_tokens
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.parity
N = 200
PROMPTS = ["a", "Once upon a time; 12 + 34 =", "\n\nnaïve café 中文 🙂\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are large, so that rounding seldom decides, and which never ends its text."""
    folder = tmp_path_factory.mktemp("model")
    mx.random.seed(3)
    model = GPT(GPTConfig(vocab_size=257, n_positions=256, n_embd=48, n_layer=3, n_head=3, initializer_range=0.3))
    end = mx.arange(257)[:, None] == Tokenizer.bytes().eot_id
    model.wte.weight = mx.where(end, 0.0, model.wte.weight)
    save(model, Tokenizer.bytes(), folder)
    return folder


def ours(folder: Path, prompt: str) -> list[int]:
    model, tokenizer = load(folder)
    return list(generate_tokens(model, tokenizer, tokenizer.encode(prompt), max_tokens=N, temperature=0))


def test_texts_are_varied_and_decided_by_more_than_rounding(folder: Path) -> None:
    model, tokenizer = load(folder)
    gaps = []
    for prompt in PROMPTS:
        run = Generation(
            model, tokenizer, [tokenizer.encode(prompt)], GenerationSettings(max_tokens=N, temperature=0, logprobs=2)
        )
        tokens = [piece.token for _, piece in run if piece.token]
        assert len(tokens) == N
        assert len({token.id for token in tokens}) > 10  # a text that goes in circles would prove little
        gaps += [token.top[0][1] - token.top[1][1] for token in tokens]
    assert min(gaps) > 1e-4  # far above float32's rounding


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = peer.generate(**ids, do_sample=False, max_new_tokens=N, pad_token_id=tokenizer.eos_token_id)
        assert ours(folder, prompt) == out[0, ids["input_ids"].shape[1] :].tolist(), prompt
    assert torch.equal(out[0, : ids["input_ids"].shape[1]], ids["input_ids"][0])


def test_greedy_text_is_that_of_mlx_lm(folder: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(folder))
    for prompt in PROMPTS:
        theirs = [
            int(r.token) for r in mlx_lm.stream_generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=N)
        ]
        assert ours(folder, prompt) == theirs, prompt
