"""Text to token ids on disk: written once, then memory-mapped, however large.

A prepared folder holds, for ``train`` and ``val`` each, ``X.bin`` (the ids, uint16 or uint32 by vocabulary) and
``X.starts.bin`` (int64, where the documents begin), the tokenizer's files, and ``data.json``, which says what they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_gpt.errors import DataError
from mlx_gpt.files import atomic_path, cache_folder
from mlx_gpt.text.sources import Piece, Sources
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer
from mlx_gpt.text.windows import TokenStream

ABOUT = "data.json"
FORMAT = 1
PARTS = ("train", "val")
BATCH = 1 << 22  # characters that are encoded side by side
SAMPLE = 5_000_000  # characters that a new vocabulary is learned from
Progress = Callable[[int], None]  # is told how many bytes of text have been encoded


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened: the ids stay on the disk until they are looked at."""

    folder: Path
    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    about: dict[str, Any]  # what data.json says

    @property
    def tokens_per_byte(self) -> float:
        """Of the validation text: what a loss in nats per token is multiplied by on its way to bits per byte."""
        return self.val.n_tokens / max(1, self.about["val"]["bytes"])


def prepare_text(sources: Sources, tokenizer: str | Tokenizer, out: Path, progress: Progress | None = None) -> Prepared:
    """Encode all the text of ``sources`` into the new folder ``out``; a new vocabulary is learned from its beginning.

    All is written beside its place and moved there at the end: what was interrupted is never taken for finished. Raises
    ``DataError`` for text that cannot be read or is too little, and where the disk is full.
    """
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, lambda: _beginning(sources))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as staging:
            staging.mkdir()
            about = {"format": FORMAT, "tokenizer_sha256": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
            about |= {"dtype": _dtype(tokenizer).name, "val_fraction": sources.val_fraction, "seed": sources.seed}
            about |= _write_parts(sources, tokenizer, staging, progress)
            about |= {"sources": sources.hashes, "bytes_replaced": sources.replaced}
            tokenizer.save(staging)
            (staging / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); make room, or choose another folder") from error
    return open_prepared(out)


def open_prepared(folder: Path) -> Prepared:
    """What ``prepare_text`` wrote. ``DataError`` for files that are missing, cut short or of another tokenizer."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = about["format"] == FORMAT and {about[part]["tokens"] >= 0 for part in PARTS} == {True}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / ABOUT}: expected what mlx-gpt prepare wrote; prepare the text again") from error
    if not known:
        raise DataError(f"{folder / ABOUT}: expected format {FORMAT}, found another; prepare the text again")
    tokenizer = Tokenizer.from_folder(folder)
    check_tokenizer(about, tokenizer, folder)
    train, val = (_open_part(folder, part, about) for part in PARTS)
    return Prepared(folder, train, val, tokenizer, about)


def is_prepared(folder: Path) -> bool:
    """Whether ``mlx-gpt prepare`` made this folder."""
    return (folder / ABOUT).is_file()


def check_tokenizer(about: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """``DataError`` unless the ids were made with this tokenizer: with another they would mean something else."""
    if (wanted := about.get("tokenizer_sha256")) != tokenizer.hash:
        raise DataError(
            f"{folder}: the text was prepared with another tokenizer (vocabulary sha256 {str(wanted)[:8]}, and this "
            f"one is {tokenizer.hash[:8]}); prepare it again with this one"
        )


def cached(sources: Sources, tokenizer: str | Tokenizer, progress: Progress | None = None) -> Prepared:
    """``prepare_text`` into the user's cache, or what is there already for the same files, tokenizer and split."""
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
    try:
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources.files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); leave it out") from error
    key = json.dumps([FORMAT, stamps, spec, sources.val_fraction, sources.seed])
    folder = cache_folder() / "prepared" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if is_prepared(folder):
        try:
            return open_prepared(folder)
        except DataError:  # damaged: it is only a copy
            shutil.rmtree(folder, ignore_errors=True)
    return prepare_text(sources, tokenizer, folder, progress)


def _beginning(sources: Sources) -> Iterator[str]:
    left = SAMPLE
    for piece in sources.pieces():
        if not piece.val:
            yield piece.text[:left]
            left -= len(piece.text)
        if left <= 0:
            return


def _write_parts(
    sources: Sources, tokenizer: Tokenizer, folder: Path, progress: Progress | None
) -> dict[str, dict[str, int]]:
    writers = {part: _Writer(folder, part, tokenizer) for part in PARTS}
    try:
        for batch in _batches(sources.pieces()):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writers["val" if piece.val else "train"].write(piece, ids)
            if progress:
                progress(sum(writer.counts["bytes"] for writer in writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    for part, writer in writers.items():
        if not writer.counts["bytes"]:
            raise DataError(
                f"expected text to train on and to measure by, found nothing for {part}; bring more text, or another "
                f"share for validation"
            )
    return {part: writer.counts for part, writer in writers.items()}


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


class _Writer:
    """One part: ``<|endoftext|>`` before each document and after the last, as ``TokenStream`` has it."""

    def __init__(self, folder: Path, part: str, tokenizer: Tokenizer):
        self.dtype, self.eot_id = _dtype(tokenizer), tokenizer.eot_id
        self.ids: BinaryIO = _ids_file(folder, part).open("wb")
        self.starts: BinaryIO = _starts_file(folder, part).open("wb")
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def write(self, piece: Piece, ids: list[int]) -> None:
        if piece.starts or not self.counts["documents"]:
            self._mark()
            self.counts["documents"] += 1
        self.ids.write(np.array(ids, self.dtype).tobytes())
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += len(piece.text.encode("utf-8", "replace"))

    def close(self) -> None:
        self._mark()
        self.ids.close()
        self.starts.close()

    def _mark(self) -> None:
        self.starts.write(np.int64(self.counts["tokens"]).tobytes())
        self.ids.write(self.dtype.type(self.eot_id).tobytes())
        self.counts["tokens"] += 1


def _open_part(folder: Path, part: str, about: dict[str, Any]) -> TokenStream:
    counts, dtype = about[part], np.dtype(about["dtype"])
    files = {
        _ids_file(folder, part): (dtype, counts["tokens"]),
        _starts_file(folder, part): (np.dtype(np.int64), counts["documents"] + 1),
    }
    arrays = []
    for file, (kind, n) in files.items():
        found = file.stat().st_size if file.is_file() else 0
        if found != n * kind.itemsize:
            raise DataError(
                f"{file}: expected {n * kind.itemsize} bytes, found {found}; it was cut short or changed: prepare the "
                f"text again"
            )
        arrays.append(np.memmap(file, kind, "r", shape=(n,)))
    ids, starts = arrays
    return TokenStream(ids, starts)


def _ids_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.bin"


def _starts_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.starts.bin"


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
