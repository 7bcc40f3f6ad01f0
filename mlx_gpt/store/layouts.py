"""Every layout of GPT-2's weights that can be read. A new layout is a file with two functions, and an entry here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.gguf import find_gguf, read_gguf
from mlx_gpt.store.huggingface import read_huggingface
from mlx_gpt.store.llmc import is_llmc, read_llmc
from mlx_gpt.store.locate import find_folder
from mlx_gpt.store.pytorch import PICKLES, find_pickle, read_pytorch
from mlx_gpt.store.source import ModelSource
from mlx_gpt.store.tensorflow import is_tensorflow, read_tensorflow


class Layout(NamedTuple):
    """A predicate of a file or folder, and the function that reads what it accepts."""

    matches: Callable[[Path], object]
    read: Callable[[Path], ModelSource]


LAYOUTS = (  # the first that matches is read
    Layout(find_gguf, read_gguf),  # llama.cpp's .gguf, or a folder with one
    Layout(is_llmc, read_llmc),  # llm.c's .bin
    Layout(is_tensorflow, read_tensorflow),  # OpenAI's release: a folder with hparams.json
    Layout(find_pickle, read_pytorch),  # pytorch_model.bin, whole or in shards; nanoGPT's ckpt.pt
    Layout(Path.is_dir, read_huggingface),  # config.json and safetensors; mlx-lm's folders as well
)


def find_source(name: str | os.PathLike[str], revision: str | None = None, pickles: bool = False) -> ModelSource:
    """Return the GPT-2 called ``name``: a file, a folder, or a repository of the hub. Raises ``ModelFolderError``.

    Pickles are opened only if ``pickles``: they take torch, and ``mlx-gpt convert`` replaces them once and for all.
    """
    path = Path(name).expanduser()
    is_known_file = revision is None and path.is_file() and any(layout.matches(path) for layout in LAYOUTS)
    return read_source(path if is_known_file else find_folder(name, revision, pickles), pickles)


def read_source(path: Path, pickles: bool = False) -> ModelSource:
    """Return the GPT-2 in a file or folder on this machine."""
    read = next((layout.read for layout in LAYOUTS if layout.matches(path)), read_huggingface)
    if read is read_pytorch and not pickles:
        file = find_pickle(path) or path
        raise ModelFolderError(
            f"{file}: expected safetensors, found a pickle, which can run code when opened; with torch installed, make "
            f"a model folder of it: mlx-gpt convert {file.parent if file.name in PICKLES else file} DEST"
        )
    return read(path)
