"""PyTorch's layouts: ``pytorch_model.bin``, whole or in shards, a file of tensors, or nanoGPT's checkpoint."""

from __future__ import annotations

from pathlib import Path

from mlx_gpt.store.huggingface import has_safetensors, read_shards
from mlx_gpt.store.model_config import CONFIG, read_config
from mlx_gpt.store.nanogpt import CHECKPOINT, is_nanogpt, read_nanogpt
from mlx_gpt.store.pickles import arrays_of, read_pickle
from mlx_gpt.store.source import ModelSource

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # of a hub model, whole or in shards


def find_pickle(path: Path) -> Path | None:
    """Return the pickle that holds a model's weights, or the index of its shards; None if safetensors do."""
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    if not (path / CONFIG).exists():
        names: tuple[str, ...] = (CHECKPOINT,)
    else:
        names = () if has_safetensors(path) else PICKLES
    return next((path / name for name in names if (path / name).exists()), None)


def read_pytorch(path: Path) -> ModelSource:
    """Read a file or a folder that ``find_pickle`` accepts. Takes torch."""
    file = find_pickle(path)
    assert file
    if file.name == PICKLES[1]:
        weights = read_shards(file, lambda shard: arrays_of(read_pickle(shard), shard))
    elif is_nanogpt(content := read_pickle(file)):
        return read_nanogpt(content, file)
    else:
        weights = arrays_of(content, file)
    return ModelSource(PICKLES[0], file.parent, read_config(file.parent), weights)
