"""Export a model for other programs. A new format is a file with a function, and an entry in ``WRITERS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import atomic_path, expand_user
from mlx_gpt.model.mlp import ACTIVATION
from mlx_gpt.store.folder import PathLike
from mlx_gpt.store.gguf_write import write_gguf
from mlx_gpt.store.llmc import write_llmc
from mlx_gpt.store.nanogpt import write_nanogpt
from mlx_gpt.store.pickles import import_torch
from mlx_gpt.store.source import ModelSource
from mlx_gpt.text.characters import CharacterTokenizer, read_characters


class LayoutWriter(NamedTuple):
    """A format: its function, its dtypes (the first is the default), and what its program computes."""

    write: Callable[[Path, ModelSource, mx.Dtype], None]
    dtypes: tuple[mx.Dtype, ...]
    activations: tuple[str, ...]
    fixed: tuple[str, ...]  # fields of GPTConfig that must be GPT-2's


SCALING = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
SHAPE = ("layer_norm_epsilon", "tie_word_embeddings", "n_inner", *SCALING)
GPT2_IDS = range(50257, 50257 + 256)  # GPT-2's vocabulary, perhaps padded
TOKENIZERS = {  # where the other programs take them from
    "llm.c": "llm.c reads gpt2_tokenizer.bin, GPT-2's, in the folder it runs in",
    "nanogpt": "nanoGPT's sample.py reads GPT-2's, or characters from meta.pkl",
}
WRITERS = {
    "llm.c": LayoutWriter(write_llmc, (mx.float32, mx.bfloat16), ("gelu_new",), SHAPE),
    "nanogpt": LayoutWriter(write_nanogpt, (mx.float32,), ("gelu", "gelu_new"), SHAPE),
    "gguf": LayoutWriter(write_gguf, (mx.float32, mx.float16), ("gelu_new",), SCALING),
}


def export(source: ModelSource, file: PathLike, to: str, dtype: mx.Dtype | None = None) -> str:
    """Write a model as a new file of another program, whole or not at all; return a remark for the user, or "".

    Raises ``UsageError``, or ``ModelFolderError`` for a model that the program would compute otherwise.
    """
    file = expand_user(file)
    if to not in WRITERS:
        raise UsageError(f"--to must be one of {', '.join(WRITERS)}, not {to!r}")
    writer = WRITERS[to]
    dtype = dtype or writer.dtypes[0]
    if dtype not in writer.dtypes:
        known = " or ".join(str(kind).removeprefix("mlx.core.") for kind in writer.dtypes)
        raise UsageError(f"{to} takes {known}, not {str(dtype).removeprefix('mlx.core.')}")
    if file.exists() or not file.parent.is_dir():
        problem = "exists already; choose a new file" if file.exists() else "its folder does not exist; create it"
        raise UsageError(f"{file}: {problem}")
    source.require_floats("export")
    check_exportable(source.config, to)
    if to == "nanogpt":
        import_torch(file)  # which its writer takes
    hidden = file
    try:
        with atomic_path(file) as hidden:
            writer.write(hidden, source, dtype)
    except (OSError, RuntimeError) as error:
        reason = str(error).replace(str(hidden), str(file))
        raise ModelFolderError(f"{file}: could not be written ({reason}); make room or choose another place") from error
    return "; ".join(_remarks(source, file, to))


def _remarks(source: ModelSource, file: Path, to: str) -> Iterator[str]:
    if to == "nanogpt" and ACTIVATION[source.config.activation_function] is not ACTIVATION["gelu"]:
        yield "nanoGPT computes the exact GELU, this model its tanh form: nanoGPT's logits will differ a little"
    if to == "llm.c" or (to == "nanogpt" and source.config.vocab_size not in GPT2_IDS):
        where = source.folder if source.tokenizer is None else "a folder that mlx-gpt convert makes"
        files = "vocab.json and merges.txt"
        if isinstance(source.tokenizer, CharacterTokenizer) or read_characters(source.folder):
            files = "meta.pkl, or tokenizer.json" if to == "nanogpt" else "tokenizer.json"
        yield (f"the tokenizer is not in {file.name}: for mlx-gpt, copy {files} of {where} beside it; {TOKENIZERS[to]}")


def check_exportable(config: GPTConfig, to: str) -> None:
    """Raise ``ModelFolderError`` unless the other program computes what this model computes."""
    if problem := _problem(config, to):
        others = [f"--to {other}" for other in WRITERS if not _problem(config, other)]
        remedy = f"export it {' or '.join(others)}" if others else "use its folder, which transformers and mlx-lm read"
        raise ModelFolderError(f"{problem}: it cannot be exported; {remedy}")


def _problem(config: GPTConfig, to: str) -> str:
    """Return what the other program would compute otherwise, or ""."""
    names = WRITERS[to].activations
    if all(ACTIVATION[config.activation_function] is not ACTIVATION[name] for name in names):
        known = " or ".join(names)
        return f"{to} computes activation_function = {known} only, this model has {config.activation_function}"
    for name in WRITERS[to].fixed:
        expected, found = getattr(GPTConfig(), name), getattr(config, name)
        if name == "n_inner" and config.inner_dim == 4 * config.n_embd:
            continue
        if found != expected:
            only = "4 * n_embd" if name == "n_inner" else expected
            return f"{to} computes {name} = {only} only, this model has {found}"
    return ""
