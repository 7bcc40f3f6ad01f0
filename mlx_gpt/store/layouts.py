"""The one way from a name to a model: every layout of GPT-2's weights that can be read, recognised by its contents.

A new layout is a file with two functions, and an entry in ``LAYOUTS``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import expand_user
from mlx_gpt.store.gguf import is_gguf, read_gguf
from mlx_gpt.store.huggingface import INDEX, WEIGHTS, has_safetensors, is_safetensors, read_huggingface
from mlx_gpt.store.llmc import is_llmc, read_llmc
from mlx_gpt.store.locate import ADAPTER, download
from mlx_gpt.store.model_config import CONFIG, read_json
from mlx_gpt.store.nanogpt import CHECKPOINT
from mlx_gpt.store.pytorch import PICKLES, find_pickle, read_pytorch
from mlx_gpt.store.source import ModelSource
from mlx_gpt.store.tensorflow import HPARAMS, is_tensorflow, read_tensorflow


class Layout(NamedTuple):
    """A predicate of a file or folder, and the function that reads what it accepts."""

    matches: Callable[[Path], object]
    read: Callable[[Path], ModelSource]


LAYOUTS = (  # the first that matches is read
    Layout(is_gguf, read_gguf),  # llama.cpp's .gguf
    Layout(is_llmc, read_llmc),  # llm.c's .bin
    Layout(is_safetensors, read_huggingface),  # a file beside its config.json
    Layout(is_tensorflow, read_tensorflow),  # OpenAI's release: a folder with hparams.json
    Layout(has_safetensors, read_huggingface),  # a folder of transformers, of mlx-lm, of a run
    Layout(find_pickle, read_pytorch),  # pytorch_model.bin, whole or in shards; a training program's checkpoint
)
TAKEN_FIRST = (WEIGHTS, INDEX, *PICKLES, CHECKPOINT)  # the weights of a folder
# Files that mean their folder.
PART = re.compile(rf"{CONFIG}|{WEIGHTS}|{HPARAMS}|adapter.*|.*\.index(\.json)?|.*-\d{{5}}-of-\d{{5}}(\.\w+)?")
NO_MODEL = re.compile(r"\.|(optimizer|scheduler|scaler|training_args|rng_state|adapter)")  # beginnings of names
FOREIGN = {  # first bytes of files that are not read
    b"version https://git-lfs": "a git-lfs pointer to them (run git lfs pull)",
    b"\x89HDF": "HDF5, as of Keras",
    b"\x93NUMPY": "a NumPy array",
}


def find_source(name: str | os.PathLike[str], revision: str | None = None) -> ModelSource:
    """Return the GPT-2 called ``name``: a file, a folder, or a repository of the hub, downloaded.

    ``revision`` is a branch, tag or commit on the hub. A ``Path`` is never taken for a hub id. Raises
    ``ModelFolderError``.
    """
    path = expand_user(name)
    if not os.fspath(name) or not path.exists():
        return _read(download(name, revision))
    if revision is not None:
        kind = "folder" if path.is_dir() else "file"
        raise ModelFolderError(
            f"{path}: a revision ({revision!r}) names a version on the hub, but this is a {kind} here; leave it out"
        )
    return read_source(path)


def read_source(path: Path) -> ModelSource:
    """Return the GPT-2 in a file or folder on this machine."""
    if path.is_file() and PART.fullmatch(path.name):
        path = path.parent
    if path.is_dir():
        path = _weights_of(path)
    return _read(path)


def _read(path: Path) -> ModelSource:
    if (path / ADAPTER).exists():
        base = read_json(path / ADAPTER).get("base_model_name_or_path") or read_json(path / ADAPTER).get("model")
        raise ModelFolderError(
            f"{path}: holds an adapter (LoRA) of {base or 'another model'}, not a model; merge it first (PEFT: "
            f"merge_and_unload(), then save_pretrained; mlx-lm: mlx_lm.fuse), or remove {ADAPTER} if it is merged"
        )
    for layout in LAYOUTS:
        if layout.matches(path):
            return layout.read(path)
    raise _unknown(path)


def _weights_of(folder: Path) -> Path:
    """Return a folder whose weights have a usual name, or else its only file of weights."""
    usual = [name for name in TAKEN_FIRST if (folder / name).exists()]
    has_shards = any(folder.glob("*-of-*"))  # without them mlx-lm's index lists the one file
    if others := [name for name in usual[1:] if has_shards or not name.endswith(".json")]:
        logging.getLogger(__name__).warning("%s: reads %s, not %s", folder, usual[0], " or ".join(others))
    if any(layout.matches(folder) for layout in LAYOUTS):
        return folder
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not NO_MODEL.match(file.name)]
    found = [file for file in files if any(layout.matches(file) for layout in LAYOUTS)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8])
        raise ModelFolderError(f"{folder}: expected one file of weights, found {names}; give one of them")
    return found[0] if found else folder


def _unknown(path: Path) -> ModelFolderError:
    if not path.is_dir():
        start = path.open("rb").read(24) if path.is_file() else None
        found = next((what for magic, what in FOREIGN.items() if start and start.startswith(magic)), None)
        found = found or (f"a file that begins with {start[:8]!r}" if start else "an empty file")
        return ModelFolderError(
            f"{path}: expected a model folder or a file of weights (safetensors, PyTorch's, llm.c's .bin, GGUF), found "
            f"{'a device or a pipe' if start is None else found}; give the folder of a model"
        )
    if (path / CONFIG).exists():
        return ModelFolderError(f"{path}: expected {WEIGHTS}, found no weights; fetch the folder again")
    below = {file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{CONFIG}")}
    remedy = f"give one of {', '.join(sorted(map(str, below))[:8])}" if below else "give the folder of a model"
    return ModelFolderError(f"{path}: expected {CONFIG} and {WEIGHTS}, found neither; {remedy}")
