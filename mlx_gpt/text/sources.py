"""Read text: the one reader of ``prepare``, ``train``, ``eval``, and of prompts from files and pipes.

Names
    A file, a folder (its files and those of its subfolders, without hidden ones and without those of an unknown suffix,
    which are counted), a glob, a named corpus, standard input (``-``) or a process substitution. A file that several
    names mean counts once. Named pipes, devices, model folders and prepared folders are refused.
Formats, by suffix in upper or lower case
    ``.txt``, ``.md`` and, of a file or a glob, unknown suffixes: text. ``.json``, ``.jsonl``, ``.ndjson``: objects, one
    after another or in an array, or an object of columns. ``.csv``, ``.tsv``: a table with a header. ``.parquet``,
    ``.arrow``: a table. Without a suffix, or from a pipe: JSON, Parquet or Arrow if it begins like that. Compressed by
    gzip, bzip2, xz or zstd: decompressed; ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` follow the other suffix.
Encoding
    UTF-8, or that of the byte order mark: UTF-8, UTF-16 or UTF-32. The mark is dropped. Bytes that do not decode become
    U+FFFD; if these are more than a tenth, or there is any zero byte, the file is refused. The line ends ``\\r\\n`` and
    ``\\r`` become ``\\n``, in records too.
Documents
    A text file is a document; so is a record: its field or column ``text``, or ``--field``. ``<|endoftext|>`` separates
    documents, and line ends after it are dropped. Empty documents are left out.
Parts of a data set
    Files named ``train``, ``val``, ``valid``, ``validation``, ``dev``, ``eval`` or ``test`` side by side
    (``train.jsonl``, ``corpus-train.txt``, ``train-00000-of-00002.parquet``, or in folders ``train/`` and ``test/``)
    are for training, for validation, and left out. Other files in the same folder or glob are left out too.
    ``--val-data`` names the validation text instead. Without either, ``split`` takes a share.

``Changes`` has what was changed or left out; every command prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.text.cutting import Cutter, TextPiece
from mlx_gpt.text.decoding import EMPTY, REPLACED, Changes, decoded_size
from mlx_gpt.text.find import TRAIN, VAL, TextFile, check_name, find_files, one_file
from mlx_gpt.text.pipes import is_copy
from mlx_gpt.text.records import TEXT, Records, arrow_records, reader_of, text_file
from mlx_gpt.text.split import VAL_FRACTION, is_val_record, split_files

IN_BOTH = "for validation too, left out of training"
COPY = "the same text as another file"
OTHER_VAL = "left out, --val-data names another validation text"


@dataclass
class Sources:
    """Files to read, and results of reading them. ``pieces`` may be called more than once."""

    files: list[TextFile]
    val_fraction: float
    seed: int  # of the split
    text_field: str = TEXT  # of a record
    found: Changes = field(default_factory=Changes)  # in finding the files
    read: Changes = field(default_factory=Changes)  # in the last call of ``pieces``
    hashes: dict[str, str] = field(default_factory=dict)  # file -> sha256, likewise

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"the validation fraction must be between 0 and 1, not {self.val_fraction:g}")

    @property
    def changes(self) -> str:
        """All changes in one line, "" without any."""
        return "; ".join(filter(None, (str(self.found), str(self.read))))

    @property
    def replaced(self) -> int:
        """The number of bytes that are not UTF-8."""
        return self.read.count(REPLACED)

    @property
    def names(self) -> str:
        """The files, for an error."""
        names = [str(file.path) for file in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more files" if len(names) > 3 else "")

    @property
    def n_bytes(self) -> int:
        """The size of all files in bytes, decompressed; a missing file counts 0."""
        return sum(_size(file.path) for file in self.files if file.path.exists())

    @property
    def stamps(self) -> list[list[str | int | None]]:
        """Values of each file that change when it does. Raises ``DataError`` for a missing file."""
        stamps: list[list[str | int | None]] = []
        for file in self.files:
            with _readable(file.path):
                copy = [sha256_of(file.path)] if is_copy(file.path) else [str(file.path.resolve()), *_stamp(file.path)]
                stamps.append([file.part, *copy, *([] if is_copy(file.path) else [file.path.stat().st_ctime_ns])])
        return stamps

    def pieces(self) -> Iterator[TextPiece]:
        """Yield all the text, file by file. Raises ``DataError`` for a file that is not text, missing, or changing."""
        self.read, self.hashes = Changes(), {}
        texts: set[bytes] = set()  # the hash of each file's
        for number, file in enumerate(self.files):
            with _readable(file.path):
                before = _stamp(file.path)
                text = sha256()
                for piece in self._file(number, file):
                    text.update(piece.text.encode())
                    yield piece
                if _stamp(file.path) != before:
                    raise DataError(f"{file.path}: changed while it was read; try again when no program writes to it")
                self.read.add(COPY, file.path, text.digest() in texts and text.digest() != sha256().digest())
                texts.add(text.digest())
                self.hashes[str(file.path)] = sha256_of(file.path)

    def _file(self, number: int, file: TextFile) -> Iterator[TextPiece]:
        cutter = Cutter(file.path, self.read, self._train_bytes.get(number))
        for i, record in enumerate(self._records(file.path, self.read)):
            if file.part:
                cutter.val = file.part == VAL
            elif number not in self._train_bytes:
                cutter.val = is_val_record(number, i, self.val_fraction, self.seed)
            yield from cutter.document(record)

    def _records(self, path: Path, changes: Changes) -> Records:
        return reader_of(path)(path, self.text_field, changes)

    @cached_property
    def _train_bytes(self) -> dict[int, int | None]:
        """The bytes of text for training, of each file that is split by bytes, not by records. None: all."""
        texts: dict[int, Path] = {}
        records: dict[int, Path] = {}
        for i, file in enumerate(self.files):
            if not file.part:
                with _readable(file.path):
                    (texts if reader_of(file.path) is text_file else records)[i] = file.path
        sizes = {i: decoded_size(path) for i, path in texts.items()}
        if self._is_one_sided(records):
            sizes |= {i: sum(n for _, n in self._lengths(path)) for i, path in records.items()}
        return {**dict.fromkeys(sizes), **split_files(sizes, self.val_fraction, self.seed)}

    def _is_one_sided(self, files: dict[int, Path]) -> bool:
        """Return True if all records are for training, or all for validation, as one record is."""
        found = set()
        for number, path in files.items():
            for i, n in self._lengths(path):
                if n:
                    found.add(is_val_record(number, i, self.val_fraction, self.seed))
                if len(found) == 2:
                    return False
        return True

    def _lengths(self, path: Path) -> Iterator[tuple[int, int]]:
        """Yield the number of each record and its bytes in UTF-8."""
        with _readable(path):
            for i, record in enumerate(self._records(path, Changes())):
                yield i, sum(len(text.encode("utf-8", "surrogatepass")) for text in record)


def find_sources(
    names: Sequence[str],
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    val_data: str | None = None,
    text_field: str = TEXT,
) -> Sources:
    """Find the files of each name, and those of ``val_data``. Raises ``DataError`` for no files."""
    sources = Sources([], val_fraction, seed, text_field)
    with _readable(Path(", ".join(names))):
        files = find_files(names, text_field, sources.found)
        if val_data is not None:
            check_name(val_data, "--val-data")
            val = find_files([val_data], text_field, Changes() if val_data in names else sources.found)
            files = _with_validation(files, val, sources.found, val_data)
    _check_field(text_field, [file.path for file in files])
    has_val = any(file.part == VAL for file in files)
    if has_val and val_fraction != VAL_FRACTION:
        raise UsageError(f"--val-fraction {val_fraction:g}: there are files for validation; leave it out")
    sources.files = [TextFile(file.path, (file.part or TRAIN) if has_val else None) for file in files]
    return sources


def _with_validation(files: list[TextFile], val: list[TextFile], changes: Changes, name: str) -> list[TextFile]:
    """Return the training files and those of ``--val-data``, which are for validation only."""
    val = [file for file in val if file.part == VAL] or val
    kept = []
    for file in files:
        in_both = any(file.path.samefile(other.path) for other in val)
        if in_both or file.part == VAL:
            changes.add(IN_BOTH if in_both else OTHER_VAL, file.path, file.part != VAL or not in_both)
        else:
            kept.append(file)
    if not kept:
        raise UsageError(f"--val-data {name}: is the training text too; name another text, or leave it out")
    return [*kept, *(TextFile(file.path, VAL) for file in val)]


def read_text(
    name: str | Path, text_field: str = TEXT, as_text: bool = False, with_empty: bool = False
) -> tuple[str, Changes]:
    """Read a file or pipe whole: its text, or its records joined by empty lines. Raises ``DataError``.

    ``as_text``: a name without a suffix is a text file. ``with_empty``: empty records are joined too.
    ``<|endoftext|>`` stays in the text, for ``Tokenizer.encode_documents``.
    """
    changes = Changes()
    path = one_file(str(name))
    with _readable(path):
        _check_field(text_field, [path])
        reader = text_file if as_text and not path.suffix else reader_of(path)
        cutter = Cutter(path, changes)
        texts = ["".join(cutter.clean(record)) for record in reader(path, text_field, changes)]
    if reader is not text_file and not with_empty:
        changes.add(EMPTY, path, texts.count(""))
        texts = [text for text in texts if text]
    return "\n\n".join(texts), changes


def _check_field(name: str, files: list[Path]) -> None:
    """Raise ``UsageError`` for a field that no file can have."""
    if not name:
        raise UsageError("--field '': expected the name of a field or column; leave it out for 'text'")
    if name != TEXT and all(reader_of(path) is text_file for path in files):
        raise UsageError(f"--field {name}: text has no fields or columns; leave it out")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise ``DataError`` for an ``OSError``."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); restore it, or leave it out") from error


def _size(path: Path) -> int:
    return path.stat().st_size if reader_of(path) is arrow_records else decoded_size(path)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return values that change when a file is written to or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
