"""The model in weights/tinyworld: it generates at once and offline, and has the loss that weights/README.md states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_gpt import load
from mlx_gpt.cli import main
from mlx_gpt.text.windows import TokenStream, Windows
from mlx_gpt.tinyworld.stories import best_loss, generate_stories, is_sentence, split_sentences
from mlx_gpt.train.step import make_eval_step
from mlx_gpt.train.validation import evaluate

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "weights/tinyworld"


def test_it_continues_a_prompt_with_sentences_of_its_world(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "One sunny morning, Lily"
    flags = ["--temperature", "0.7", "--seed", "1", "--max-tokens", "60"]
    assert main(["generate", str(FOLDER), "--prompt", prompt, *flags]) == 0
    sentences = split_sentences(prompt + capsys.readouterr().out.rstrip("\n"))
    assert len(sentences) > 5
    assert [sentence for sentence in sentences[:-1] if not is_sentence(sentence)] == []


def test_it_has_the_loss_that_its_readme_states() -> None:
    text = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"validation loss is (\d\.\d{3}) nats per token, (\d\.\d{3}) above the best", text)
    model, tokenizer = load(FOLDER)
    stories = generate_stories(200, seed=1)  # the quickstart's validation stories
    stream = TokenStream.from_documents(stories, tokenizer)
    windows = Windows.over(stream, model.config.n_positions)
    loss = evaluate(model, make_eval_step(model.eval()), windows, batch_size=16)
    assert [f"{loss:.3f}", f"{loss - best_loss(stories, stream.n_tokens):.3f}"] == list(stated)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_500_000
