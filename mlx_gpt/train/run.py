"""A whole run: from text and settings to a folder with the model, its metrics and the plot of its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text import tinyworld
from mlx_gpt.text.corpus import Corpus
from mlx_gpt.text.shards import TokenStream, entropies
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer
from mlx_gpt.train.loop import TrainConfig, train
from mlx_gpt.train.report import Report, plot_loss

if TYPE_CHECKING:
    from rich.console import Console

TOKENIZER_SAMPLE = 5_000_000  # characters of the training text that a new vocabulary is learned from


@dataclass(frozen=True)
class Material:
    """What a run trains on: the text as ids, and what a loss on it may be compared with."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    marks: dict[str, float]  # name -> nats per token, from the worst to the best


def prepare(corpus: Corpus, tokenizer_spec: str) -> Material:
    """Learn or take a vocabulary, encode the text, and work out what to compare the loss with."""
    tokenizer = make_tokenizer(tokenizer_spec, lambda: _beginning(corpus.train))
    train_stream = TokenStream.from_documents(corpus.train, tokenizer)
    val_stream = TokenStream.from_documents(corpus.val, tokenizer)
    unigram, bigram = entropies(train_stream, tokenizer.vocab_size)
    marks = {"ln V": log(tokenizer.vocab_size), "unigram": unigram, "bigram": bigram}
    if corpus.name == "tinyworld":
        marks["best possible"] = tinyworld.best_loss(corpus.val, val_stream.n_tokens)
    return Material(corpus, tokenizer, train_stream, val_stream, marks)


def _beginning(documents: list[str]) -> list[str]:
    taken, length = [], 0
    for document in documents:
        taken.append(document[: TOKENIZER_SAMPLE - length])
        length += len(taken[-1])
        if length >= TOKENIZER_SAMPLE:
            break
    return taken


@dataclass(frozen=True)
class Run:
    """What a run leaves: the trained model, the folder it lies in, its last validation loss (nats per token)."""

    model: GPT
    tokenizer: Tokenizer
    folder: Path
    val_loss: float
    plot: Path


def new_model(config: GPTConfig, material: Material, seed: int) -> GPT:
    """An untrained model with the vocabulary of the text; the same weights for the same seed."""
    mx.random.seed(seed)
    return GPT(replace(config, vocab_size=material.tokenizer.vocab_size))


def run(
    model: GPT,
    material: Material,
    config: TrainConfig,
    out: Path,
    console: Console,
    on_eval: Callable[[int, float], None] | None = None,
) -> Run:
    """Train, and leave in ``out`` a model folder, ``metrics.jsonl`` and ``loss.png``.

    ``out`` must be new or empty (``UsageError``): nothing of an earlier run is ever overwritten.
    """
    check_new(out)
    report = Report(out, console)
    try:
        val_loss = train(model, material.train, material.val, config, report, on_eval)
    finally:
        report.close()
    save(model, material.tokenizer, out)
    plot = out / "loss.png"
    plot_loss(report.rows, material.marks, plot, f"{material.corpus.name}: {model.n_parameters:,} parameters")
    return Run(model, material.tokenizer, out, val_loss, plot)


def check_new(out: Path) -> None:
    """``UsageError`` unless a run may be written there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; choose a new folder, or remove it if you do not need it")
