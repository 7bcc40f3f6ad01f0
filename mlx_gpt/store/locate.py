"""Find a model's folder: on this machine, or downloaded from the Hugging Face hub into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlx_gpt.errors import HubError, ModelFolderError
from mlx_gpt.hub import fetch
from mlx_gpt.store.huggingface import has_safetensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # gpt2, openai-community/gpt2

# The gpt2 repository also has weights for TensorFlow, Flax, Rust and ONNX, which are not downloaded.
NEEDED = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
NEEDED += ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"]
NEEDED += ["special_tokens_map.json", "generation_config.json"]
NEEDED += ["vocab.txt", "*.model"]  # of other kinds of tokenizer, to refuse them
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def find_folder(name: str | os.PathLike[str], revision: str | None = None, pickles: bool = False) -> Path:
    """Return the model folder called ``name``: an existing folder, or else the hub repository with this id, downloaded.

    ``revision`` is a branch, tag or commit on the hub. With ``pickles``, they are downloaded if the hub has no
    safetensors. A ``Path`` is never taken for a hub id. Raises ``ModelFolderError``.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelFolderError(
                f"{path}: a revision ({revision!r}) names a version on the hub, but this is a folder here; leave it out"
            )
        return path
    if path.exists():
        raise ModelFolderError(f"{path}: expected a model folder, found a file; give its folder")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ModelFolderError(
            f"{name}: no such folder, and not a hub id either, which looks like gpt2 or openai-community/gpt2"
        )
    try:
        folder = fetch(name, NEEDED, revision)
        if pickles and not has_safetensors(folder):
            folder = fetch(name, PICKLES, revision)
    except HubError as error:
        raise ModelFolderError(f"{name}: no such folder here, and from the hub: {error}") from error
    if not (folder / "config.json").exists():
        raise ModelFolderError(f"{name}: the hub has it, but without a config.json; use a transformers model")
    if not pickles and not has_safetensors(folder):
        raise ModelFolderError(
            f"{name}: the hub has it, but not as safetensors; if it has a pickle, which can run code when opened, then "
            f"with torch installed make a model folder of it: mlx-gpt convert {name} DEST"
        )
    return folder
