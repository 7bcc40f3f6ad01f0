"""Datasets: training and validation text as token ids, with the losses of simple models as baselines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import expand_user
from mlx_gpt.text.corpora import CORPORA, GeneratedCorpus
from mlx_gpt.text.find import check_name
from mlx_gpt.text.prepare import (
    CHANGES,
    OnProgress,
    Prepared,
    check_tokenizer,
    is_prepared,
    open_prepared,
    prepare_cached,
)
from mlx_gpt.text.records import TEXT
from mlx_gpt.text.sources import Sources, find_sources
from mlx_gpt.text.tokenizer import Tokenizer, is_made, make_tokenizer
from mlx_gpt.text.windows import TokenStream

BASELINE_SAMPLE = 10_000_000  # ids of the training text that are counted
BEST = "best possible"  # the baseline of a model that knows the rules of a generated corpus


@dataclass(frozen=True)
class Dataset:
    """A text as token ids, in two parts, and its tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    baselines: dict[str, float]  # name -> loss in nats per token, from the highest to the lowest
    tokens_per_byte: float  # of the validation text
    hash: str  # of text and tokenizer: a resumed run needs the same
    changes: str = ""  # by the reading of the text


def load_dataset(
    data: str,
    tokenizer: str | Tokenizer | None,
    on_progress: OnProgress | None = None,
    val_data: str | None = None,
    text_field: str = TEXT,
    prepare: Callable[[Sources, str | Tokenizer, OnProgress | None], Prepared] = prepare_cached,
) -> Dataset:
    """Load the text that ``data`` names: a corpus, a prepared folder, a file, a folder or a glob.

    A prepared folder has its own tokenizer; ``tokenizer`` must match it (``DataError``) or be None. Any other text
    needs one (``UsageError``). Files are encoded once by ``prepare``, and kept in the user's cache.
    """
    check_name(data, "--data")
    if isinstance(tokenizer, str) and not is_made(tokenizer):
        tokenizer = make_tokenizer(tokenizer, [])
    folder, is_generated = expand_user(data), isinstance(CORPORA.get(data), GeneratedCorpus)
    if is_generated or is_prepared(folder):
        if val_data is not None:
            raise UsageError(f"--val-data {val_data}: {data} has its own validation text; leave it out")
        if text_field != TEXT:
            raise UsageError(f"--field {text_field}: {data} has no fields or columns; leave it out")
    if is_prepared(folder):
        prepared = open_prepared(folder)
        if tokenizer:
            _check_tokenizer(prepared, tokenizer)
        return _from_prepared(data, prepared)
    if tokenizer is None:
        raise UsageError(f"--data {data} needs a --tokenizer: gpt2, bytes, bpe:N, or a folder")
    if isinstance(corpus := CORPORA.get(data), GeneratedCorpus):
        return dataset_from_texts(data, *corpus.open(), tokenizer)
    sources = find_sources([data], val_data=val_data, text_field=text_field)
    return _from_prepared(data, prepare(sources, tokenizer, on_progress))


def dataset_from_texts(name: str, train: list[str], val: list[str], tokenizer: str | Tokenizer) -> Dataset:
    """Encode documents in memory. ``bpe:N`` learns a vocabulary from the beginning of the training text.

    The name of a generated corpus adds the baseline ``BEST``.
    """
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, train)
    train_ids, val_ids = (TokenStream.from_documents(part, tokenizer) for part in (train, val))
    baselines = _baselines(train_ids, tokenizer)
    if isinstance(corpus := CORPORA.get(name), GeneratedCorpus):
        baselines[BEST] = corpus.best_loss(val, val_ids.n_tokens)
    n_bytes = sum(len(document.encode()) for document in val)
    digest = hashlib.sha256(train_ids.ids.tobytes() + val_ids.ids.tobytes() + tokenizer.hash.encode()).hexdigest()
    return Dataset(name, tokenizer, train_ids, val_ids, baselines, val_ids.n_tokens / n_bytes, digest)


def unigram_and_bigram_entropy(stream: TokenStream, vocab_size: int) -> tuple[float, float]:
    """Return H(token) and H(token | previous token) in nats: the losses of the best unigram and bigram models."""
    # Counted over the targets, all ids but the first. The first and the last are both <|endoftext|>, so the previous
    # tokens, all ids but the last, have the same counts, and H(pair) - H(token) = H(token | previous token).
    unigram = _entropy(stream.ids[1:])
    pairs = stream.ids[:-1].astype(np.int64) * vocab_size + stream.ids[1:]
    return unigram, _entropy(pairs) - unigram


def _from_prepared(name: str, prepared: Prepared) -> Dataset:
    metadata = {**prepared.metadata, "sources": list(prepared.metadata["sources"].values())}  # contents, not paths
    changes = metadata.pop(CHANGES, "")
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    baselines = _baselines(prepared.train, prepared.tokenizer)
    per_byte = prepared.tokens_per_byte
    return Dataset(name, prepared.tokenizer, prepared.train, prepared.val, baselines, per_byte, digest, changes)


def _check_tokenizer(prepared: Prepared, tokenizer: str | Tokenizer) -> None:
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):  # learned from text: only its size can be compared
        if tokenizer != f"bpe:{prepared.tokenizer.vocab_size}":
            raise DataError(
                f"{prepared.folder}: the text was prepared with a vocabulary of {prepared.tokenizer.vocab_size} ids, "
                f"not {tokenizer}; leave out --tokenizer, or prepare it again"
            )
        return
    expected = make_tokenizer(tokenizer, []) if isinstance(tokenizer, str) else tokenizer
    check_tokenizer(prepared.metadata, expected, prepared.folder)


def _baselines(train: TokenStream, tokenizer: Tokenizer) -> dict[str, float]:
    sample = TokenStream(train.ids[:BASELINE_SAMPLE], train.starts)
    unigram, bigram = unigram_and_bigram_entropy(sample, tokenizer.vocab_size)
    return {"ln V": log(tokenizer.vocab_size), "unigram": unigram, "bigram": bigram}


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
