"""What a run trains on: a text as ids, and what a loss on it may be compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from mlx_gpt import hub
from mlx_gpt.errors import DataError, HubError, UsageError
from mlx_gpt.text.corpus import Corpus, load_corpus
from mlx_gpt.text.prepare import Prepared, Progress, cached, check_tokenizer, is_prepared, open_prepared
from mlx_gpt.text.sources import Sources, find_sources
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer
from mlx_gpt.text.windows import TokenStream, entropies
from mlx_gpt.tinyworld import stories as tinyworld

TOKENIZER_SAMPLE = 5_000_000  # characters of the training text that a new vocabulary is learned from
BASELINE_SAMPLE = 10_000_000  # ids of the training text that are counted
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Dataset:
    """A text in two parts, to train on and to measure by, and its tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    baselines: dict[str, float]  # name -> nats per token, from the worst to the best
    tokens_per_byte: float  # of the validation text
    hash: str  # of text and tokenizer: a run that goes on must find the same


def load_dataset(data: str, tokenizer: str | Tokenizer | None, progress: Progress | None = None) -> Dataset:
    """The text that ``data`` names: ``tinyworld``, a folder from ``mlx-gpt prepare``, or what that takes.

    What is not prepared yet is prepared in the user's cache, once, and needs a ``tokenizer``. A prepared folder has its
    own; where one is asked for it must be that one (``DataError``).
    """
    folder = Path(data).expanduser()
    if is_prepared(folder):
        found = open_prepared(folder)
        if tokenizer:
            _check_tokenizer(found, tokenizer)
        return _dataset(data, found)
    if tokenizer is None:
        raise UsageError(f"--data {data} needs a --tokenizer: gpt2, bytes, or bpe:N")
    if data == "tinyworld":
        return dataset_from_texts(load_corpus(data), tokenizer)
    return _dataset(data, cached(find_text([data]), tokenizer, progress))


def text_size(data: str) -> int:
    """Bytes of the files that ``data`` names. ``DataError`` where there are none."""
    return sum(file.stat().st_size for file in find_text([data]).files if file.exists())


def find_text(names: Sequence[str], val_fraction: float = VAL_FRACTION, seed: int = 0) -> Sources:
    """``find_sources``, with the named corpora of the hub."""
    return find_sources(names, val_fraction, seed, _from_hub)


def _from_hub(repository: str, file: str) -> Path:
    try:
        return hub.fetch(repository, [file], kind="dataset") / file
    except HubError as error:
        raise DataError(f"{repository}: {error}; or download {file} by hand and give its path") from error


def dataset_from_texts(corpus: Corpus, tokenizer: str | Tokenizer) -> Dataset:
    """A text that is in memory: learn or take a vocabulary, and encode it."""
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, lambda: _beginning(corpus.train))
    train = TokenStream.from_documents(corpus.train, tokenizer)
    val = TokenStream.from_documents(corpus.val, tokenizer)
    baselines = _baselines(train, tokenizer)
    if corpus.name == "tinyworld":
        baselines["best possible"] = tinyworld.best_loss(corpus.val, val.n_tokens)
    n_bytes = sum(len(document.encode()) for document in corpus.val)
    digest = hashlib.sha256(train.ids.tobytes() + val.ids.tobytes() + tokenizer.hash.encode()).hexdigest()
    return Dataset(corpus.name, tokenizer, train, val, baselines, val.n_tokens / n_bytes, digest)


def _dataset(name: str, found: Prepared) -> Dataset:
    about = {**found.about, "sources": list(found.about["sources"].values())}  # what they hold, not where they are
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    baselines = _baselines(found.train, found.tokenizer)
    return Dataset(name, found.tokenizer, found.train, found.val, baselines, found.tokens_per_byte, digest)


def _check_tokenizer(found: Prepared, tokenizer: str | Tokenizer) -> None:
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):  # which it would be, only the text can say
        if tokenizer != f"bpe:{found.tokenizer.vocab_size}":
            raise DataError(
                f"{found.folder}: the text was prepared with a vocabulary of {found.tokenizer.vocab_size} ids, not "
                f"{tokenizer}; leave out --tokenizer, or prepare it again"
            )
        return
    wanted = make_tokenizer(tokenizer, []) if isinstance(tokenizer, str) else tokenizer
    check_tokenizer(found.about, wanted, found.folder)


def _baselines(train: TokenStream, tokenizer: Tokenizer) -> dict[str, float]:
    unigram, bigram = entropies(TokenStream(train.ids[:BASELINE_SAMPLE], train.starts), tokenizer.vocab_size)
    return {"ln V": log(tokenizer.vocab_size), "unigram": unigram, "bigram": bigram}


def _beginning(documents: list[str]) -> list[str]:
    taken, length = [], 0
    for document in documents:
        taken.append(document[: TOKENIZER_SAMPLE - length])
        length += len(taken[-1])
        if length >= TOKENIZER_SAMPLE:
            break
    return taken
