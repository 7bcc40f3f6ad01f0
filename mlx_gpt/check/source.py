"""The files of a GPT-2 as they lie in a folder, read with NumPy alone: what a model is checked against.

Nothing here goes through ``store/``, which loads models: a mistake there must not be made here as well. So this is a
second, smaller reader of the same formats: ``config.json``, and safetensors, whole or in shards
(github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.errors import ModelFolderError

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16

# What config.json may leave out (transformers, GPT2Config), and what else it may call it.
DEFAULTS: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5}
DEFAULTS |= {"activation_function": "gelu_new", "tie_word_embeddings": True}
DEFAULTS |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out)
BUFFERS = ("attn.bias", "attn.masked_bias")  # the causal mask, which older files carry along
ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where it is, and how to read it."""

    file: Path
    kind: str  # F32, F16, BF16, ... as safetensors calls them
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    def read(self, dtype: Any = np.float64) -> np.ndarray:
        """Its values. They are on the disk until then."""
        raw = np.memmap(self.file, NUMPY[self.kind], "r", self.offset, self.shape)
        if self.kind == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32).astype(dtype)
        return np.asarray(raw, dtype)


class Source:
    """A model folder in the hub's layout: its ``settings``, and its ``tensors`` by their unprefixed names.

    Matrices are (in, out), as OpenAI released them: a layer is ``x @ W + b``.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        found = _json(self.folder / "config.json")
        self.settings: dict[str, Any] = DEFAULTS | {ALIASES.get(name, name): value for name, value in found.items()}
        self.files = weight_files(self.folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self.tensors |= {name.removeprefix("transformer."): stored for name, stored in _header(file).items()}

    def read(self, name: str, dtype: Any = np.float64) -> np.ndarray:
        """One tensor. Raises ``ModelFolderError`` where it is missing, or holds no floats."""
        if name not in self.tensors:
            raise ModelFolderError(f"{self.folder}: expected a tensor {name}, found none; this is no GPT-2's folder")
        stored = self.tensors[name]
        if stored.kind not in NUMPY:
            raise ModelFolderError(
                f"{self.folder}: {name}: expected F32, F16 or BF16, found {stored.kind}; verify the float model that a "
                f"quantized one was made from"
            )
        return stored.read(dtype)

    def block(self, layer: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """The tensors of one block by their names inside it: ``ln_1.weight``, ``attn.c_attn.weight``, ..."""
        prefix = f"h.{layer}."
        names = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
        return {name: self.read(prefix + name, dtype) for name in names if name not in BUFFERS}

    @property
    def head(self) -> str:
        """The name of the matrix that the stream is compared with at the end."""
        return "wte.weight" if self.settings["tie_word_embeddings"] else "lm_head.weight"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; ``ModelFolderError`` where there are none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ModelFolderError(
            f"{folder}: expected model.safetensors to check the model against, found none; "
            f"convert the weights first: mlx-gpt convert {folder} DEST"
        )
    return [folder / Path(name).name for name in sorted(set(_json(index)["weight_map"].values()))]


def _header(file: Path) -> dict[str, Stored]:
    """8 bytes of length, then a JSON header of that length, then the data, at offsets from there."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > file.stat().st_size:
            raise ModelFolderError(f"{file}: expected a safetensors file, found no whole header in it; fetch it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{file}: expected JSON, but it cannot be read ({error}); fetch it again") from error
