"""A second, smaller reader of the hub's format, in NumPy: the weights that a loaded model is checked against.

It shares no code with ``store/``, which loads models, so that a bug there is not repeated here. It reads
``config.json`` and safetensors, whole or in shards (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.errors import ModelFolderError

NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16

# The defaults of config.json (transformers, GPT2Config), and its aliases.
DEFAULTS: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5}
DEFAULTS |= {"activation_function": "gelu_new", "tie_word_embeddings": True}
DEFAULTS |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored as (in, out)
BUFFERS = ("attn.bias", "attn.masked_bias")  # the causal mask, which older files contain


@dataclass(frozen=True)
class TensorInFile:
    """A tensor of a safetensors file, on disk until it is read."""

    file: Path
    name: str
    kind: str  # F32, F16, BF16, ... as safetensors calls them
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    def read(self, dtype: Any) -> np.ndarray:
        """Return the values. Raises ``ModelFolderError`` unless they are floats."""
        if self.kind not in NUMPY_DTYPES:
            raise ModelFolderError(
                f"{self.file}: {self.name}: expected F32, F16 or BF16, found {self.kind}; verify the float model that "
                f"a quantized one was made from"
            )
        raw = np.memmap(self.file, NUMPY_DTYPES[self.kind], "r", self.offset, self.shape)
        if self.kind == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32).astype(dtype)
        return np.asarray(raw, dtype)


class HubWeights:
    """GPT-2's weights under the hub's names (without ``transformer.``), and the settings of its config.json.

    Matrices are (in, out), as OpenAI released them: a layer is ``x @ W + b``.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray | TensorInFile], config: Mapping[str, Any]):
        self.settings = DEFAULTS | {ALIASES.get(name, name): value for name, value in config.items()}
        self.tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    def read(self, name: str, dtype: Any = np.float64) -> np.ndarray:
        """Return one tensor. Raises ``ModelFolderError`` if it is missing or holds no floats."""
        if name not in self.tensors:
            raise ModelFolderError(f"expected a tensor {name}, found none; these are not the weights of a GPT-2")
        tensor = self.tensors[name]
        return tensor.read(dtype) if isinstance(tensor, TensorInFile) else np.asarray(tensor, dtype)

    def block(self, layer: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """Return the tensors of one block by their names inside it: ``ln_1.weight``, ``attn.c_attn.weight``, ..."""
        prefix = f"h.{layer}."
        names = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
        return {name: self.read(prefix + name, dtype) for name in names if name not in BUFFERS}

    @property
    def head(self) -> str:
        """The name of the output embedding, (V, C)."""
        return "wte.weight" if self.settings["tie_word_embeddings"] else "lm_head.weight"


class HubFolder(HubWeights):
    """A model folder in the hub's layout. Raises ``ModelFolderError`` for a folder without safetensors."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        config = _read_json(self.folder / "config.json")
        self.files = weight_files(self.folder)
        tensors: dict[str, TensorInFile] = {}
        for file in self.files:
            tensors |= _read_header(file)
        if any(name.endswith(".scales") for name in tensors):
            raise ModelFolderError(f"{folder}: is quantized; verify the float model that it was made from")
        super().__init__(tensors, config)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. Raises ``ModelFolderError`` if there are none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ModelFolderError(
            f"{folder}: expected model.safetensors to check the model against, found none; "
            f"convert the weights first: mlx-gpt convert {folder} DEST"
        )
    return [folder / Path(name).name for name in sorted(set(_read_json(index)["weight_map"].values()))]


def _read_header(file: Path) -> dict[str, TensorInFile]:
    """Parse a safetensors header: its length in 8 bytes, then JSON. Offsets of data count from the header's end."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > file.stat().st_size:
            raise ModelFolderError(f"{file}: expected a safetensors file, found an incomplete header; fetch it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: TensorInFile(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{file}: expected JSON, but it cannot be read ({error}); fetch it again") from error
