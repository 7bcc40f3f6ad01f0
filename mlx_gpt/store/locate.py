"""Download a model's folder from the Hugging Face hub into its client's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlx_gpt.errors import HubError, ModelFolderError
from mlx_gpt.hub import fetch
from mlx_gpt.store.huggingface import has_safetensors
from mlx_gpt.store.model_config import CONFIG
from mlx_gpt.store.pickles import import_torch
from mlx_gpt.text.vocab_files import TOKENIZER_FILES

ADAPTER = "adapter_config.json"  # of PEFT and of mlx-lm, whose folders lack the model itself
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # gpt2, openai-community/gpt2

# The gpt2 repository also has weights for TensorFlow, Flax, Rust and ONNX, which are not downloaded.
NEEDED = [CONFIG, ADAPTER, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
NEEDED += ["generation_config.json", *TOKENIZER_FILES]
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def download(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a hub repository, downloaded; of pickles only if it has no safetensors and torch is here.

    ``revision`` is a branch, tag or commit on the hub. Raises ``ModelFolderError``, also for a ``Path``.
    """
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ModelFolderError(
            f"{os.fspath(name) or repr(name)}: no such folder, and not a hub id either, which looks "
            f"like gpt2 or openai-community/gpt2"
        )
    try:
        folder = fetch(name, NEEDED, revision)
        if not has_safetensors(folder) and (folder / CONFIG).exists():
            import_torch(Path(name, PICKLES[0]))  # before a download
            folder = fetch(name, PICKLES, revision)
    except HubError as error:
        raise ModelFolderError(f"{name}: no such folder here, and from the hub: {error}") from error
    if not (folder / CONFIG).exists() and not (folder / ADAPTER).exists():
        raise ModelFolderError(f"{name}: the hub has it, but without a {CONFIG}; use a transformers model")
    return folder
