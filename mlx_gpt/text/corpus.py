"""Where text comes from: the built-in story world, Tiny Shakespeare, a file, or a folder of files.

A corpus is documents in two parts, one to train on and one that the model never sees, to measure it by. What a
document is: a story of ``tinyworld``, or a whole file. Later ``<|endoftext|>`` will stand between them.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import ssl
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import atomic_write, cache_folder, sha256_of

TEXT_FILES = (".txt", ".md")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of its 1,115,394 bytes
TIMEOUT = 30.0  # seconds that a server may stay silent


@dataclass(frozen=True)
class Corpus:
    """Text to train on (``train``) and to measure by (``val``), each a list of documents."""

    name: str
    train: list[str]
    val: list[str]


def load_corpus(source: str, *, val_fraction: float = 0.1, n_stories: int = 20_000, seed: int = 0) -> Corpus:
    """The corpus a setting names: ``tinyworld``, ``shakespeare``, a text file, or a folder of ``.txt`` and ``.md``.

    ``n_stories`` and ``seed`` say which stories ``tinyworld`` tells to train on; ``val_fraction`` as many more are told
    from another seed. Any other text is cut by ``split``. Raises ``DataError`` for text that cannot be had or read,
    ``UsageError`` for a number that cannot be.
    """
    _check_fraction(val_fraction)
    if source == "tinyworld":
        return _tinyworld(n_stories, val_fraction, seed)
    if source == "shakespeare":
        documents = [read_text(tiny_shakespeare())]
    elif (path := Path(source).expanduser()).is_dir():
        documents = read_folder(path)
    elif path.exists():
        documents = [read_text(path)]
    else:
        raise DataError(
            f"{source}: no such file or folder; the data is tinyworld, shakespeare, a text file, or a folder of "
            f"{' and '.join(TEXT_FILES)} files"
        )
    return Corpus(source, *split(documents, val_fraction))


def split(documents: Sequence[str], val_fraction: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Cut documents into (train, val), so that about ``val_fraction`` of the characters are for validation.

    Whole documents where there are enough: drawn by ``seed``, in their old order, as long as they fit. Where that
    leaves validation with less than half its share (one document, a few, or a giant among dwarfs), the end of every
    document instead, from a line's or a word's beginning on. Raises ``DataError`` where there is too little text.
    """
    _check_fraction(val_fraction)
    left = room = round(val_fraction * sum(map(len, documents)))
    drawn: set[int] = set()
    for i in random.Random(seed).sample(range(len(documents)), len(documents)):
        if 0 < len(documents[i]) <= left:
            drawn.add(i)
            left -= len(documents[i])
    if drawn and left <= room / 2:
        train = [document for i, document in enumerate(documents) if i not in drawn]
        return train, [documents[i] for i in sorted(drawn)]
    parts = [_cut(document, val_fraction) for document in documents]
    train = [head for head, _ in parts if head.strip()]
    val = [tail for _, tail in parts if tail.strip()]
    if not train or not val:
        raise DataError(
            f"expected enough text to keep {val_fraction:.0%} of it for validation, found "
            f"{sum(map(len, documents))} characters in {len(documents)} documents; bring more text"
        )
    return train, val


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, less a byte order mark and with ``\\n`` between lines. ``DataError`` if it has none."""
    text = _decoded(path)
    if not text.strip():
        raise DataError(f"{path}: expected text, found {'only white space' if text else 'nothing'}; give another file")
    return text


def read_folder(folder: Path) -> list[str]:
    """The text of each ``.txt`` and ``.md`` file below a folder, by path. Empty and hidden files are left out.

    Hidden is what begins with a dot, or lies in such a folder: ``.git``, or the ``._x.txt`` that macOS writes on
    foreign disks, which is no text. Raises ``DataError`` where nothing is left.
    """
    below = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    files = [folder / path for path in shown if path.suffix.lower() in TEXT_FILES and (folder / path).is_file()]
    documents = [text for text in map(_decoded, files) if text.strip()]
    if not documents:
        raise DataError(
            f"{folder}: expected {' or '.join(TEXT_FILES)} files with text, found {len(files)} such files and no text; "
            f"give another folder"
        )
    return documents


def tiny_shakespeare() -> Path:
    """Tiny Shakespeare (karpathy/char-rnn), 1.1 MB: downloaded once, checked, and kept in the user's cache folder.

    A file in the cache that is not the expected one is fetched again. Raises ``DataError`` where that fails.
    """
    path = cache_folder() / "tinyshakespeare.txt"
    if not (path.exists() and sha256_of(path) == SHAKESPEARE_SHA256):
        _write(path, _download(SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    return path


def _tinyworld(n_stories: int, val_fraction: float, seed: int) -> Corpus:
    if n_stories < 1:
        raise UsageError(f"the number of stories must be at least 1, not {n_stories}")
    from mlx_gpt.tinyworld import stories as tinyworld

    # Even seeds to train, odd ones to measure: no run's validation stories are another run's training stories.
    n_val = max(1, round(n_stories * val_fraction))
    return Corpus(
        "tinyworld", tinyworld.generate_stories(n_stories, 2 * seed), tinyworld.generate_stories(n_val, 2 * seed + 1)
    )


def _check_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise UsageError(f"the share of text for validation must be between 0 and 1, not {val_fraction}")


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, found the byte 0x{data[error.start]:02x} at byte offset {error.start}; "
            f"save the file as UTF-8, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another file") from error


def _cut(document: str, val_fraction: float) -> tuple[str, str]:
    """One document in two, at the last line break, or else the last space, before the share begins."""
    cut = round(len(document) * (1 - val_fraction))
    earliest = cut - min(cut, len(document) - cut) // 2  # further back, and the shares would be others
    for boundary in ("\n", " "):
        if (found := document.rfind(boundary, earliest, cut)) >= 0:
            return document[: found + 1], document[found + 1 :]
    return document[:cut], document[cut:]


def _download(url: str, sha256: str) -> bytes:
    import certifi  # comes with huggingface_hub and tiktoken; python.org's Python for macOS trusts nobody without it

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    by_hand = f"download {url} by hand and give the file's path instead"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT, context=context) as response:
            data: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:  # no network, 404, a connection that ends too early
        raise DataError(f"Tiny Shakespeare could not be downloaded ({error}); {by_hand}") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(
            f"Tiny Shakespeare came damaged: expected sha256 {sha256[:8]}…, found {found[:8]}… ({len(data)} bytes); "
            f"try again, or {by_hand}"
        )
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
