"""``examples/00_gpt_from_scratch.py`` computes what the package computes."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.lens import generate
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/00_gpt_from_scratch.py"
TINYWORLD = ROOT / "weights/tinyworld"
scratch = SimpleNamespace(**runpy.run_path(str(SCRIPT)))

SHAPES = {
    "tied": GPTConfig(vocab_size=300, n_positions=20, n_embd=24, n_layer=3, n_head=3, initializer_range=0.3),
    "untied, narrow MLP": GPTConfig(
        vocab_size=257, n_positions=12, n_embd=20, n_layer=2, n_head=5, n_inner=8, tie_word_embeddings=False
    ),
}
TEXTS = [
    "",
    'One sunny morning, Lily went to the garden. "What a lovely kite!" said Adam.',
    "I'm sure they'll say it's 'tis, we've, you'd DON'T 'S 's's",
    "The ancient oak tree provided cool shade on the hot summer day.",
    "  two  spaces\n\n\tand lines \r\n end   ",
    "1st, 2nd; x² + ½ = Ⅳ, ٣ and 一二三",
    "größer naïve 中文 हिन्दी עברית 🌳🏽‍🌾 ﬁ",
    "<|endoftext|> _under_score \x00\x1c\x85 \xa0no-break\u3000wide  \u2028x",
    "aaaaaaaa!!!???...   ...'''",
]


@pytest.fixture(scope="module", params=["tinyworld", *SHAPES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tinyworld":
        return TINYWORLD
    config = SHAPES[request.param]
    mx.random.seed(0)
    model = GPT(config)
    model.update({"ln_f": {"bias": mx.random.normal((config.n_embd,))}})  # zero in a new model
    folder = tmp_path_factory.mktemp("model")
    save(model, Tokenizer.bytes() if config.vocab_size == 257 else Tokenizer.train(TEXTS * 2, 300), folder)
    return folder


def test_it_is_under_200_lines_and_imports_nothing_of_the_package() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert "mlx_gpt" not in text


def test_its_tokens_are_the_packages(folder: Path) -> None:
    theirs, ours = Tokenizer.from_folder(folder), scratch.Tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == text
    assert ours.decode([theirs.eot_id]) == "<|endoftext|>"


def test_its_logits_loss_and_text_are_the_packages(folder: Path) -> None:
    model, _ = load(folder)
    weights, n_head, _ = scratch.load(folder)
    ids = mx.random.randint(0, model.config.vocab_size, (model.config.n_positions,), key=mx.random.key(1))
    expected = model(ids[None])
    logits = scratch.gpt(weights, ids, n_head)
    assert mx.abs(logits - expected[0]).max().item() < 2e-5 * mx.abs(expected).max().item()
    loss = mean_loss(expected[:, :-1], ids[None, 1:])
    assert scratch.loss(weights, ids, n_head).item() == pytest.approx(loss.item(), rel=1e-5)
    text = scratch.generate(weights, ids[:4].tolist(), n_head, 8)
    assert text == [*ids[:4].tolist(), *generate(model, ids[None, :4], 8)[0].tolist()]


def test_a_file_of_transformers_with_masks_has_its_logits(tmp_path: Path) -> None:
    fixture = ROOT / "tests/fixtures/tiny-gpt2"  # its names begin with "transformer."
    shutil.copy(fixture / "config.json", tmp_path)
    mask = {f"transformer.h.{layer}.attn.bias": mx.ones((1, 1, 24, 24)) for layer in range(3)}  # as in old files
    mx.save_safetensors(str(tmp_path / "model.safetensors"), mx.load(str(fixture / "model.safetensors")) | mask)
    Tokenizer.bytes().save(tmp_path)
    weights, n_head, _ = scratch.load(tmp_path)
    stored = np.load(fixture / "logits.npz")
    for ids, logits in zip(stored["ids"], stored["plain"], strict=True):
        difference = np.abs(np.array(scratch.gpt(weights, mx.array(ids.astype(np.int32)), n_head)) - logits)
        assert difference.max() < 1e-5 * np.abs(logits).max()


def test_it_generates_beyond_its_context(folder: Path) -> None:
    weights, n_head, _ = scratch.load(folder)
    context = len(weights["wpe"]["weight"])
    assert len(scratch.generate(weights, [5] * (context - 1), n_head, 3)) == context + 2


def test_a_step_lowers_the_loss_by_its_length_times_the_squared_gradient(folder: Path) -> None:
    weights, n_head, _ = scratch.load(folder)
    ids, rate = mx.array([7, 3, 250, 9, 9, 31]), 1e-3
    before, stepped = scratch.train_step(weights, ids, n_head, rate)
    (_, gradient) = mx.value_and_grad(scratch.loss)(weights, ids, n_head)
    squared = sum((array * array).sum().item() for _, array in tree_flatten(gradient))
    fall = (before - scratch.loss(stepped, ids, n_head)).item()
    assert fall == pytest.approx(rate * squared, rel=0.2)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no config\.json, model\.safetensors, vocab\.json, merges\.txt$"):
        scratch.load(tmp_path)
