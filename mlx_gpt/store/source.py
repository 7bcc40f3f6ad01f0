"""Where a GPT-2's weights come from, recognised by what is there: each kind of file under the same few names.

| what                                                         | read by            |
|--------------------------------------------------------------|--------------------|
| a folder or a repository of the hub: ``config.json``         | ``tensors``        |
| the same with ``pytorch_model.bin``, whole or in shards      | ``pickles``, torch |
| a folder of mlx-lm's, quantized perhaps                      | ``tensors``        |
| nanoGPT's ``ckpt.pt``, or the folder it lies in              | ``nanogpt``, torch |
| llm.c's ``.bin``                                             | ``llmc``           |
| OpenAI's release for TensorFlow: ``hparams.json``            | ``tf_bundle``      |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import (
    MLX_LM,
    Quantization,
    Weights,
    cast,
    check_weights,
    from_hub,
    from_linear,
    parameters_of,
    to_hub,
)
from mlx_gpt.store.llmc import is_llmc, read_llmc
from mlx_gpt.store.locate import find_folder
from mlx_gpt.store.model_config import CONFIG, read_config, read_quantization
from mlx_gpt.store.nanogpt import CHECKPOINT, from_nanogpt, is_nanogpt
from mlx_gpt.store.pickles import arrays_of, read_pickle
from mlx_gpt.store.safetensors import has_safetensors, read_shards, read_weights
from mlx_gpt.store.tensorflow import HPARAMS, read_tensorflow

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # of a hub model, whole or in shards


@dataclass(frozen=True)
class ModelSource:
    """A GPT-2 as it was found. Its weights are lazy, and in the layout of their file.

    They can be taken once: an array that is kept here as well would stay in memory when it has been used.
    """

    kind: str
    place: Path  # the folder that holds the tokenizer's files, if there are any
    config: GPTConfig
    weights: Weights
    is_linear: bool = False  # matrices are (out, in), not (in, out) as on the hub
    packing: Quantization | None = None

    def parameters(self, dtype: mx.Dtype | None = mx.float32) -> Weights:
        """The parameters of ``GPT(config)``; None leaves each in its own dtype."""
        weights = self._take()
        if self.is_linear:
            return from_linear(weights, self.config, dtype, self.packing)
        return from_hub(weights, self.config, dtype)

    def tensors(self, dtype: mx.Dtype | None = None) -> Weights:
        """The same as the hub has them, (in, out)."""
        if self.is_linear:
            return to_hub(self.parameters(dtype))
        weights = parameters_of(self._take(), self.config)
        check_weights(weights, self.config)
        return {name: cast(weight, dtype) for name, weight in weights.items()}

    def _take(self) -> Weights:
        weights = dict(self.weights)
        self.weights.clear()
        return weights


def find_source(name: str | os.PathLike[str], revision: str | None = None, pickles: bool = False) -> ModelSource:
    """The GPT-2 called ``name``: a file, a folder, or a repository of the hub. Raises ``ModelFolderError``.

    Pickles are opened only with ``pickles``: it takes torch, and a model folder can be had of them once and for all.
    """
    path = Path(name).expanduser()
    if path.is_file() and revision is None:
        if is_llmc(path):
            return ModelSource("llm.c", path.parent, *read_llmc(path), is_linear=True)
        if path.suffix in PICKLED:
            return _pickled(path, pickles)
    return source_in(find_folder(name, revision, pickles), pickles)


def source_in(folder: Path, pickles: bool = False) -> ModelSource:
    """The GPT-2 in a folder."""
    if not (folder / CONFIG).exists():
        if (folder / HPARAMS).exists():
            return ModelSource("TensorFlow", folder, *read_tensorflow(folder))
        if (folder / CHECKPOINT).exists():
            return _pickled(folder / CHECKPOINT, pickles)
    config = read_config(folder)
    if not has_safetensors(folder) and (file := _pickle_in(folder)):
        _allow(file, pickles)
        return ModelSource("pytorch_model.bin", folder, config, _read_pickles(file))
    weights = read_weights(folder)
    if any(name.startswith(MLX_LM) for name in weights):
        return ModelSource("mlx-lm", folder, config, weights, True, read_quantization(folder))
    return ModelSource("Hugging Face", folder, config, weights)


def _pickled(file: Path, pickles: bool) -> ModelSource:
    _allow(file, pickles)
    content = read_pickle(file)
    if is_nanogpt(content):
        return ModelSource("nanoGPT", file.parent, *from_nanogpt(content, file), is_linear=True)
    return ModelSource("pytorch_model.bin", file.parent, read_config(file.parent), arrays_of(content, file))


def _allow(file: Path, pickles: bool) -> None:
    if not pickles:
        place = file.parent if file.name in PICKLES else file
        raise ModelFolderError(
            f"{file}: expected safetensors, found a pickle, which can run code when opened; with torch installed, make "
            f"a model folder of it: mlx-gpt convert {place} DEST"
        )


def _pickle_in(folder: Path) -> Path | None:
    return next((folder / name for name in PICKLES if (folder / name).exists()), None)


def _read_pickles(file: Path) -> Weights:
    if file.name == PICKLES[0]:
        return arrays_of(read_pickle(file), file)
    return read_shards(file, lambda shard: arrays_of(read_pickle(shard), shard))
