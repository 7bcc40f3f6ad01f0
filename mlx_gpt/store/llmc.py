"""llm.c's model files, ``gpt2_124M.bin`` and ``gpt2_124M_bf16.bin``: a header of 256 int32, then the parameters.

The header: magic, version (3 float32, 5 bfloat16), positions, vocabulary, layers, heads, width, and the vocabulary
padded to a multiple of 128. The parameters follow kind by kind, each kind over all layers; matrices are (out, in), and
the token embedding is padded (llm.c, ``train_gpt2.py``, ``write_model``).
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import linear_shapes
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.model_config import config_of
from mlx_gpt.store.safetensors import raw_bytes
from mlx_gpt.store.source import ModelSource

MAGIC, N_HEADER = 20240326, 256
FLOAT32, BFLOAT16 = 3, 5  # versions
PADDED_TO = 128
KINDS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # each a weight, then a bias


def is_llmc(path: Path) -> bool:
    """Return True for a file that begins with llm.c's magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == MAGIC.to_bytes(4, "little")


def read_llmc(file: Path) -> ModelSource:
    """Read a file; its parameters are mapped. Raises ``ModelFolderError`` unless all of them are there."""
    header = np.fromfile(file, "<i4", 8).tolist()
    size = file.stat().st_size
    if len(header) < 8 or header[1] not in (FLOAT32, BFLOAT16):
        raise ModelFolderError(
            f"{file}: expected llm.c's version 3 (float32) or 5 (bfloat16), found {header[1:2]}; "
            f"write it again with a newer llm.c"
        )
    _, version, T, V, L, H, C, padded = header
    itemsize = 4 if version == FLOAT32 else 2
    expected = 4 * N_HEADER + itemsize * (padded * C + T * C + L * (12 * C * C + 13 * C) + 2 * C)
    if size != expected or not 0 < V <= padded:
        raise ModelFolderError(
            f"{file}: expected {expected} bytes, as its header says ({L} layers of width {C}, {V} ids padded to "
            f"{padded}), found {size}; copy or write the file again"
        )
    config = config_of(file, vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)
    data = np.memmap(file, "<f4" if version == FLOAT32 else "<u2", "r", 4 * N_HEADER)
    shapes, begin, tensors = linear_shapes(config), 0, {}
    for name in file_order(config):
        n = prod(shapes[name])
        tensors[name] = data[begin : begin + n].reshape(shapes[name])
        begin += n if name != "wte.weight" else padded * C
    return ModelSource("llm.c", file.parent, config, mapped_arrays(tensors), is_linear=True)


def write_llmc(file: Path, source: ModelSource, dtype: mx.Dtype) -> None:
    """Write a model as llm.c reads it, in float32 or bfloat16, one tensor at a time."""
    config, weights = source.config, source.parameters(None)
    version = {mx.float32: FLOAT32, mx.bfloat16: BFLOAT16}[dtype]
    V, C = config.vocab_size, config.n_embd
    padded = -(-V // PADDED_TO) * PADDED_TO
    header = np.zeros(N_HEADER, "<i4")
    header[:8] = MAGIC, version, config.n_positions, V, config.n_layer, config.n_head, C, padded
    with file.open("wb") as stream:
        stream.write(header.tobytes())
        for name in file_order(config):
            stream.write(raw_bytes(weights.pop(name).astype(dtype)))
            if name == "wte.weight":
                stream.write(bytes((padded - V) * C * dtype.size))
            mx.clear_cache()


def file_order(config: GPTConfig) -> list[str]:
    """Return the names of the parameters in the order of the file."""
    layered = [f"h.{i}.{kind}.{part}" for kind in KINDS for part in ("weight", "bias") for i in range(config.n_layer)]
    return ["wte.weight", "wpe.weight", *layered, "ln_f.weight", "ln_f.bias"]
