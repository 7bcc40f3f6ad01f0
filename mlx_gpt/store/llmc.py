"""llm.c's model files, ``gpt2_124M.bin`` and ``gpt2_124M_bf16.bin``: 256 numbers, then the parameters.

The numbers are int32: magic, version (3 float32, 5 bfloat16), positions, vocabulary, layers, heads, width, and the
vocabulary padded to a multiple of 128. The parameters follow kind by kind, each kind over all layers; matrices are
(out, in), and the token embedding has its padding (llm.c, ``train_gpt2.py``, ``write_model``).
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.store.convert import Weights, linear_shapes
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.safetensors import raw_bytes

MAGIC, N_HEADER = 20240326, 256
FLOAT32, BFLOAT16 = 3, 5  # versions
PADDED_TO = 128
KINDS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # each a weight, then a bias
# What llm.c computes, whatever the file.
FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "n_inner": None,
}
FIXED |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def is_llmc(file: Path) -> bool:
    """Whether a file begins as llm.c's do."""
    with file.open("rb") as stream:
        return stream.read(4) == MAGIC.to_bytes(4, "little")


def read_llmc(file: Path) -> tuple[GPTConfig, Weights]:
    """The settings and, lazily, the parameters in a file. Raises ``ModelFolderError`` unless all of them are there."""
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
    try:
        config = GPTConfig(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)
    except UsageError as error:
        raise ModelFolderError(f"{file}: {error}") from error
    data = np.memmap(file, "<f4" if version == FLOAT32 else "<u2", "r", 4 * N_HEADER)
    shapes, at, tensors = linear_shapes(config), 0, {}
    for name in in_order(config):
        n = prod(shapes[name])
        tensors[name] = data[at : at + n].reshape(shapes[name])
        at += n if name != "wte.weight" else padded * C
    return config, mapped_arrays(tensors)


def write_llmc(file: Path, config: GPTConfig, weights: Weights, dtype: mx.Dtype) -> None:
    """Write our parameters as llm.c reads them, in float32 or bfloat16, one after the other. Empties ``weights``."""
    version = {mx.float32: FLOAT32, mx.bfloat16: BFLOAT16}[dtype]
    V, C = config.vocab_size, config.n_embd
    padded = -(-V // PADDED_TO) * PADDED_TO
    header = np.zeros(N_HEADER, "<i4")
    header[:8] = MAGIC, version, config.n_positions, V, config.n_layer, config.n_head, C, padded
    with file.open("wb") as stream:
        stream.write(header.tobytes())
        for name in in_order(config):
            stream.write(raw_bytes(weights.pop(name).astype(dtype)))
            if name == "wte.weight":
                stream.write(bytes((padded - V) * C * dtype.size))
            mx.clear_cache()


def in_order(config: GPTConfig) -> list[str]:
    """The parameters' names as the file has them."""
    layered = [f"h.{i}.{kind}.{part}" for kind in KINDS for part in ("weight", "bias") for i in range(config.n_layer)]
    return ["wte.weight", "wpe.weight", *layered, "ln_f.weight", "ln_f.bias"]
