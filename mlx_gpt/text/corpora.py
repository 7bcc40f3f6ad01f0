"""The named corpora. A new corpus is one entry in ``CORPORA``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_gpt import hub
from mlx_gpt.errors import DataError, HubError
from mlx_gpt.files import atomic_write, cache_folder, sha256_of
from mlx_gpt.tinyworld.stories import best_loss, generate_stories

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of 1,115,394 bytes
TINYWORLD_TOKENIZER = "bpe:980"  # nearly every word is one token; the corpus has pairs for few more
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class FileCorpus:
    """A corpus in one file. ``open`` downloads it once and returns its path; it raises ``DataError``."""

    open: Callable[[], Path]


@dataclass(frozen=True)
class GeneratedCorpus:
    """A corpus generated in memory, with a known best loss."""

    open: Callable[[], tuple[list[str], list[str]]]  # the documents for training, and those for validation
    best_loss: Callable[[Sequence[str], int], float]  # of documents with so many tokens, in nats per token
    tokenizer: str  # the default


def tinyworld(
    n_train: int = 20_000, n_val: int = 2_000, seed: int = 0, processes: int = 1
) -> tuple[list[str], list[str]]:
    """Generate stories for training and for validation.

    Even seeds are for training, odd ones for validation: no validation story is another run's training story.
    """
    return generate_stories(n_train, 2 * seed, processes), generate_stories(n_val, 2 * seed + 1)


def tiny_shakespeare() -> Path:
    """Return the file of Tiny Shakespeare (karpathy/char-rnn, 1.1 MB), downloaded to the cache unless it is there."""
    path = cache_folder() / "tinyshakespeare.txt"
    if path.exists() and sha256_of(path) == SHAKESPEARE_SHA256:
        return path
    data = _download(SHAKESPEARE_URL, SHAKESPEARE_SHA256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
    return path


def hub_file(repository: str, file: str) -> Path:
    """Return a file of a dataset on the Hugging Face hub, downloaded to the client's cache. Raises ``DataError``."""
    try:
        return hub.fetch(repository, [file], kind="dataset") / file
    except HubError as error:
        raise DataError(f"{repository}: {error}; or download {file} by hand and give its path") from error


CORPORA: dict[str, FileCorpus | GeneratedCorpus] = {
    "tinyworld": GeneratedCorpus(tinyworld, best_loss, TINYWORLD_TOKENIZER),
    "shakespeare": FileCorpus(tiny_shakespeare),
    "tinystories": FileCorpus(partial(hub_file, "roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt")),
    "fineweb-edu": FileCorpus(partial(hub_file, "HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet")),
}


def _download(url: str, sha256: str) -> bytes:
    import http.client
    import ssl
    import urllib.request

    import certifi  # a dependency of huggingface_hub; python.org's Python for macOS has no root certificates

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    remedy = f"download {url} by hand and give the file's path instead"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT, context=context) as response:
            data: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:  # no network, an HTTP status, a connection that breaks
        raise DataError(f"the download failed ({error}); {remedy}") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(
            f"the download is damaged: expected sha256 {sha256[:8]}…, found {found[:8]}… ({len(data)} bytes); "
            f"try again, or {remedy}"
        )
    return data
