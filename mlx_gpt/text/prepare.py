"""Encode text to token ids on disk, once; they are memory-mapped from then on.

A prepared folder holds for ``train`` and ``val`` each ``X.bin`` (the ids, uint16 or uint32) and ``X.starts.bin``
(int64, the position of each document), the tokenizer's files, and ``data.json`` with counts and settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.files import atomic_path, cache_folder
from mlx_gpt.text.cutting import TextPiece
from mlx_gpt.text.sources import Sources
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer
from mlx_gpt.text.windows import TokenStream

METADATA = "data.json"
FORMAT = 1
READER = 3  # of the rules of reading, which a cached folder depends on
CHANGES = "changes"  # by the reading of the text
PARTS = {"train": "training", "val": "validation"}
BATCH = 1 << 22  # characters encoded at once
OnProgress = Callable[[int], None]  # called with the number of bytes encoded so far


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened. The ids are mapped from the disk."""

    folder: Path
    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    metadata: dict[str, Any]  # of data.json

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of the validation text, to convert a loss in nats per token to bits per byte."""
        return self.val.n_tokens / max(1, self.metadata["val"]["bytes"])


def prepare_text(
    sources: Sources, tokenizer: str | Tokenizer, out: Path, on_progress: OnProgress | None = None
) -> Prepared:
    """Encode the text of ``sources`` into the new folder ``out``, written atomically.

    A new vocabulary (``bpe:N``) is learned from the beginning of the training text. Raises ``DataError`` for text that
    cannot be read or is too short, and for a full disk.
    """
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, (piece.text for piece in sources.pieces() if not piece.val))
    metadata: dict[str, Any] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as staging:
            staging.mkdir()
            metadata |= {"format": FORMAT, "tokenizer_sha256": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
            metadata |= {"dtype": _dtype(tokenizer).name, "val_fraction": sources.val_fraction, "seed": sources.seed}
            metadata |= _write_parts(sources, tokenizer, staging, on_progress)
            metadata |= {"sources": sources.hashes, "bytes_replaced": sources.replaced, CHANGES: sources.changes}
            tokenizer.save(staging)
            (staging / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        if _is_same(out, metadata):  # another process prepared it meanwhile
            return open_prepared(out)
        raise DataError(f"{out}: cannot be written ({error.strerror}); make room, or choose another folder") from error
    return open_prepared(out)


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared folder. Raises ``DataError`` for files that are missing, truncated or of another tokenizer."""
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        valid = metadata["format"] == FORMAT and all(metadata[part]["tokens"] >= 0 for part in PARTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / METADATA}: expected a file written by mlx-gpt prepare; prepare the text again"
        ) from error
    if not valid:
        raise DataError(f"{folder / METADATA}: expected format {FORMAT}, found another; prepare the text again")
    tokenizer = Tokenizer.from_folder(folder)
    check_tokenizer(metadata, tokenizer, folder)
    train, val = (_open_part(folder, part, metadata) for part in PARTS)
    return Prepared(folder, train, val, tokenizer, metadata)


def is_prepared(folder: Path) -> bool:
    """Return True for a folder written by ``mlx-gpt prepare``."""
    return (folder / METADATA).is_file()


def check_tokenizer(metadata: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ``DataError`` unless the ids of a prepared folder were made with this tokenizer."""
    if (expected := metadata.get("tokenizer_sha256")) != tokenizer.hash:
        raise DataError(
            f"{folder}: the text was prepared with another tokenizer (vocabulary sha256 {str(expected)[:8]}, and this "
            f"one is {tokenizer.hash[:8]}); prepare it again with this one"
        )


def prepare_cached(sources: Sources, tokenizer: str | Tokenizer, on_progress: OnProgress | None = None) -> Prepared:
    """Call ``prepare_text`` for a folder in the user's cache, or open it if files, tokenizer and split are the same."""
    folder = cached_folder(sources, tokenizer)
    if is_prepared(folder):
        try:
            return open_prepared(folder)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged: prepare it again
    return prepare_text(sources, tokenizer, folder, on_progress)


def cached_folder(sources: Sources, tokenizer: str | Tokenizer) -> Path:
    """Return the folder in the user's cache for a text as this tokenizer encodes it, which may not exist."""
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
    key = json.dumps([FORMAT, READER, sources.stamps, sources.text_field, spec, sources.val_fraction, sources.seed])
    return cache_folder() / "prepared" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _is_same(folder: Path, metadata: dict[str, Any]) -> bool:
    try:
        return open_prepared(folder).metadata == metadata
    except DataError:
        return False


def _write_parts(
    sources: Sources, tokenizer: Tokenizer, folder: Path, on_progress: OnProgress | None
) -> dict[str, dict[str, int]]:
    writers = {part: _Writer(folder, part, tokenizer) for part in PARTS}
    try:
        for batch in _batches(sources.pieces()):
            texts, starts = [piece.text for piece in batch], [piece.starts for piece in batch]
            for piece, ids in zip(batch, tokenizer.encode_batch(texts, starts), strict=True):
                writers["val" if piece.val else "train"].write(piece, ids)
            if on_progress:
                on_progress(sum(writer.counts["bytes"] for writer in writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    for part, writer in writers.items():
        if not writer.counts["bytes"]:
            raise DataError(
                f"{sources.names}: expected text for training and for validation, found none for {PARTS[part]}; "
                f"use more text, or another validation fraction"
            )
    return {part: writer.counts for part, writer in writers.items()}


def _batches(pieces: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


class _Writer:
    """Writes the files of one part, in the form of a ``TokenStream``."""

    def __init__(self, folder: Path, part: str, tokenizer: Tokenizer):
        self.dtype, self.eot_id, self.opening = _dtype(tokenizer), tokenizer.eot_id, tokenizer.opening
        self.ids, self.starts = (file.open("wb") for file in _files(folder, part))
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def write(self, piece: TextPiece, ids: list[int]) -> None:
        if piece.starts or not self.counts["documents"]:
            self._write_eot()
            self.counts["documents"] += 1
            ids = [*self.opening, *ids]
        self.ids.write(np.array(ids, self.dtype).tobytes())
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += len(piece.text.encode("utf-8", "replace"))

    def close(self) -> None:
        self._write_eot()
        self.ids.close()
        self.starts.close()

    def _write_eot(self) -> None:
        self.starts.write(np.int64(self.counts["tokens"]).tobytes())
        self.ids.write(self.dtype.type(self.eot_id).tobytes())
        self.counts["tokens"] += 1


def _open_part(folder: Path, part: str, metadata: dict[str, Any]) -> TokenStream:
    counts, dtype = metadata[part], np.dtype(metadata["dtype"])
    formats = ((dtype, counts["tokens"]), (np.dtype(np.int64), counts["documents"] + 1))
    arrays = []
    for file, (kind, n) in zip(_files(folder, part), formats, strict=True):
        found = file.stat().st_size if file.is_file() else 0
        if found != n * kind.itemsize:
            raise DataError(
                f"{file}: expected {n * kind.itemsize} bytes, found {found}; it is truncated or modified: prepare the "
                f"text again"
            )
        arrays.append(np.memmap(file, kind, "r", shape=(n,)))
    return TokenStream(*arrays)


def _files(folder: Path, part: str) -> tuple[Path, Path]:
    """Return the file of the ids, and that of the documents' starts."""
    return folder / f"{part}.bin", folder / f"{part}.starts.bin"


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
