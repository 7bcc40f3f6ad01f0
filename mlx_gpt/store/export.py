"""A model for other programs: llm.c, nanoGPT, and llama.cpp (GGUF)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import atomic_path
from mlx_gpt.store import gguf, llmc, nanogpt
from mlx_gpt.store.folder import PathLike, read_tokenizer
from mlx_gpt.store.source import ModelSource

DTYPES: dict[str, tuple[mx.Dtype, ...]] = {  # the first is the default
    "llm.c": (mx.float32, mx.bfloat16),
    "nanogpt": (mx.float32,),
    "gguf": (mx.float32, mx.float16),
}
FIXED = {"llm.c": llmc.FIXED, "nanogpt": nanogpt.FIXED, "gguf": gguf.FIXED}


def export(source: ModelSource, file: PathLike, to: str, dtype: mx.Dtype | None = None) -> str:
    """Write a model as one file of another program's; returns what one should know of it, or "".

    The file must be new. It is there when all of it is on the disk, or not at all. Raises ``UsageError``, or
    ``ModelFolderError`` for a model that the program would compute otherwise.
    """
    file = Path(file)
    if to not in DTYPES:
        raise UsageError(f"--to must be one of {', '.join(DTYPES)}, not {to!r}")
    dtype = dtype or DTYPES[to][0]
    if dtype not in DTYPES[to]:
        known = " or ".join(str(kind).removeprefix("mlx.core.") for kind in DTYPES[to])
        raise UsageError(f"{to} takes {known}, not {str(dtype).removeprefix('mlx.core.')}")
    if file.exists() or not file.parent.is_dir():
        trouble = "exists already; choose a new file" if file.exists() else "expected its folder to be there; make it"
        raise UsageError(f"{file}: {trouble}")
    if source.packing:
        raise ModelFolderError(f"{source.place}: is quantized; export the model in floats that it was made from")
    check_expressible(source.config, to)
    tokenizer = read_tokenizer(source.place, source.config) if to == "gguf" else None
    weights = source.parameters(None)
    try:
        with atomic_path(file) as hidden:
            if to == "llm.c":
                llmc.write_llmc(hidden, source.config, weights, dtype)
            elif to == "nanogpt":
                nanogpt.write_nanogpt(hidden, source.config, weights)
            elif tokenizer:
                gguf.write_gguf(hidden, source.config, weights, tokenizer, dtype)
    except (OSError, RuntimeError) as error:
        raise ModelFolderError(f"{file}: could not be written ({error}); make room or choose another place") from error
    if to == "nanogpt" and source.config.activation_function != "gelu":
        return "nanoGPT computes the exact GELU, this model its tanh form: nanoGPT's logits will differ a little"
    return ""


def check_expressible(config: GPTConfig, to: str) -> None:
    """Raise ``ModelFolderError`` unless the other program computes what this model computes."""
    for name, expected in FIXED[to].items():
        found: Any = getattr(config, name)
        if name == "n_inner" and config.inner_dim == 4 * config.n_embd:
            continue
        if found != expected:
            only = "4 * n_embd" if name == "n_inner" else expected
            raise ModelFolderError(f"{to} computes {name} = {only} only, this model has {found}: it cannot be exported")
