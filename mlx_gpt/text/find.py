"""Find the files that names mean, and the part of a data set that each is: the rules are those of ``sources``."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import expand_user
from mlx_gpt.text.corpora import CORPORA, FileCorpus
from mlx_gpt.text.decoding import OTHERS, Changes, open_bytes
from mlx_gpt.text.pipes import copy_pipe, is_pipe
from mlx_gpt.text.records import SUFFIXES, reader_of, suffix

TRAIN, VAL, TEST = "train", "val", "test"
PARTS = {"train": TRAIN, "training": TRAIN, "test": TEST} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), VAL
)
PART_NAME = re.compile(rf"(?:(.*)[-_.])?({'|'.join(PARTS)})(?:[-_.](.*))?")  # of a file, without its suffixes
SHARD = re.compile(r"[-_.]?(\d+(-of-\d+)?|[0-9a-f]{16})(?=[-_.]|$)")  # in such a name: a number, a hash
OPTIONAL = (".json", ".csv", ".tsv")  # in a folder, these are often no text
MODELS = (  # two files that only a folder of a model, or of its tokenizer, has
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("tokenizer.json", "tokenizer_config.json"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("config.json", "pytorch_model.bin"),
)
OF_MODELS = {*sum(MODELS, ()), "generation_config.json", "special_tokens_map.json", "added_tokens.json", "hparams.json"}

TWICE = "named twice, it counts once"
NO_PART = "left out, beside files for training, validation and test"
IS_TEST = "left out, a test set"
NO_TEXT = "left out, no text that --field names at its beginning; name it to see why"
OF_MODEL = "left out, a model folder"
BROKEN = "left out, a link to nothing"


@dataclass(frozen=True)
class TextFile:
    """A file, and its part: "train", "val", or None if it is to be split."""

    path: Path
    part: str | None = None


def find_files(names: Iterable[str], field: str, changes: Changes) -> list[TextFile]:
    """Return the files of each name: a file, folder, glob, pipe or named corpus. Raises ``DataError`` for none."""
    seen: set[tuple[int, int]] = set()
    by_name = [[file for file in _files(name, field, changes) if not _is_seen(file, seen, changes)] for name in names]
    labels = _labels([file for files in by_name for file in files])
    found = []
    for files in by_name:
        is_layout = any(file in labels for file in files)
        for file in files:
            part = labels.get(file)
            if part == TEST or (is_layout and not part):
                changes.add(NO_PART if part is None else IS_TEST, file)
            else:
                found.append(TextFile(file, part))
    return found


def check_name(name: str, flag: str = "") -> None:
    """Raise ``UsageError`` for an empty name, which would be the current folder."""
    if not name.strip():
        where = f"{flag} {name!r}".strip()
        raise UsageError(f"{where}: expected the name of a file, a folder, a glob or a corpus; give one")


def one_file(name: str) -> Path:
    """Return the file, or the copy of the pipe, that a name means. Raises ``DataError`` unless it can be opened."""
    check_name(name)
    path = copy_pipe(name) if is_pipe(name) else expand_user(name)
    if not path.exists():
        raise DataError(f"{name}: expected a file, found none")
    with open_bytes(path):
        pass
    return path


def is_model_folder(folder: Path) -> bool:
    """Return True for a folder that holds a model or a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in MODELS)


def _files(name: str, field: str, changes: Changes) -> list[Path]:
    check_name(name)
    corpus = CORPORA.get(name)
    if isinstance(corpus, FileCorpus):
        return [corpus.open()]
    if is_pipe(name):
        return [copy_pipe(name)]
    path = expand_user(name)
    names = [path] if os.path.lexists(path) else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    within = {parent for each in names for parent in each.parents}  # of ``**``, which matches their files too
    names = [each for each in names if each not in within]
    found = []
    for each in names:
        found += _below(each, field, changes) if each.is_dir() else [_checked(each)]
    if not found and corpus:
        raise DataError(f"{name}: generated in memory, it needs no preparation: mlx-gpt train --data {name}")
    if not found:
        raise DataError(
            f"{name}: expected text, found no such file, folder or glob, or no {', '.join(SUFFIXES)} files in it; "
            f"named corpora are {', '.join(CORPORA)}"
        )
    return found


def _checked(file: Path) -> Path:
    if file.name in OF_MODELS and is_model_folder(file.parent):
        raise DataError(f"{file}: expected text, found a file of the model folder {file.parent}; leave it out")
    return file


def _below(folder: Path, field: str, changes: Changes) -> list[Path]:
    """Return the files of text below a folder, in the order of their paths."""
    if all((folder / name).is_file() for name in ("data.json", "train.bin")):
        raise DataError(f"{folder}: expected text, found a folder that mlx-gpt prepare wrote; give it to train --data")
    if is_model_folder(folder):
        raise DataError(f"{folder}: expected text, found a model folder; train --init {folder} continues its training")
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in [name for name in folders if name.startswith(".") or is_model_folder(Path(parent, name))]:
            folders.remove(name)
            changes.add(OF_MODEL, Path(name), not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if suffix(path) not in SUFFIXES:
                changes.add(OTHERS, Path(suffix(path) or path.name))
            elif _has_text(path, field, changes):
                found.append(path)
    return sorted(found)


def _has_text(path: Path, field: str, changes: Changes) -> bool:
    """Return False for a file in a folder that is to be left out."""
    if not path.exists():
        changes.add(BROKEN, path)
        return False
    if suffix(path) not in OPTIONAL or not path.is_file() or not path.stat().st_size:
        return True
    try:
        next(iter(reader_of(path)(path, field, Changes())), None)
    except DataError:
        changes.add(NO_TEXT, path)
        return False
    return True


def _is_seen(file: Path, seen: set[tuple[int, int]], changes: Changes) -> bool:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        return False
    identity = status.st_dev, status.st_ino
    if identity in seen:
        changes.add(TWICE, file)
        return True
    seen.add(identity)
    return False


def _labels(files: Sequence[Path]) -> dict[Path, str]:
    """Return the part of each file of a data set that has files for training and others."""
    if not files:
        return {}
    base = Path(os.path.commonpath([file.absolute().parent for file in files]))
    groups: dict[tuple[Path, str], dict[Path, str]] = defaultdict(dict)
    for file in files:
        if label := _label(file.absolute(), base):
            folder, name, part = label
            groups[folder, name][file] = part
    if not any({TRAIN} < {*parts.values()} for parts in groups.values()):
        return {}
    return {file: part for parts in groups.values() for file, part in parts.items()}


def _label(file: Path, base: Path) -> tuple[Path, str, str] | None:
    """Return what the files of one data set share, a folder and a name, and the file's part."""
    for parent in file.parents:
        if parent == base:
            break
        if part := PARTS.get(parent.name.lower()):
            return parent.parent, "", part
    name = file.name.lower()
    found = PART_NAME.fullmatch(name[: name.rindex(suffix(file))] if suffix(file) else name)
    if not found:
        return None
    return file.parent, f"{found[1] or ''}*{SHARD.sub('', found[3] or '')}", PARTS[found[2]]


def _raise(error: OSError) -> NoReturn:
    raise error
