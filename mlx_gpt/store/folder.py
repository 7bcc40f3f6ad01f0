"""A model folder, as transformers and mlx-lm keep it: config.json, model.safetensors and the tokenizer's files.

``load`` trusts nothing it finds: a file that is missing, cut short, or of another model is one clear line, never a
model that talks gibberish. ``save`` writes beside what is there and moves it in when all of it is on the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import fsync
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import check_quantizable
from mlx_gpt.store.convert import Quantization, Weights, check_weights, pack, to_hub
from mlx_gpt.store.model_config import CONFIG, config_json
from mlx_gpt.store.safetensors import INDEX, WEIGHTS, check_safetensors, write_safetensors
from mlx_gpt.store.source import ModelSource, find_source, source_in
from mlx_gpt.text.tokenizer import Tokenizer

PathLike = str | os.PathLike[str]

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "encoder.json", "vocab.bpe")

# What an earlier model may have left that would speak for the new one: mlx-lm reads every model*.safetensors, and
# the other three would change the new tokenizer or its stop token.
LEFTOVERS = (
    "model-*-of-*.safetensors",
    INDEX,
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def load(name: PathLike, revision: str | None = None, dtype: mx.Dtype = mx.float32) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a folder, or of a hub repository (``load("openai-community/gpt2")``).

    llm.c's ``.bin`` and OpenAI's release for TensorFlow are read as well (``store/source``). The model is in eval mode,
    its weights are in memory as ``dtype``. Raises ``ModelFolderError``, or ``TokenizerError`` for the tokenizer's
    files, with one line that says what was expected, what was found and what to do.
    """
    source = find_source(name, revision)
    return build(source, dtype), read_tokenizer(source.place, source.config)


def read_model(folder: PathLike, dtype: mx.Dtype = mx.float32) -> GPT:
    """The model of a folder without its tokenizer, in eval mode."""
    return build(source_in(Path(folder)), dtype)


def build(source: ModelSource, dtype: mx.Dtype = mx.float32) -> GPT:
    """The model of a source, in eval mode, its weights in memory."""
    weights = source.parameters(dtype)
    model = GPT(source.config)
    if source.packing:
        nn.quantize(model, *source.packing, class_predicate=lambda name, _: f"{name}.scales" in weights)
    model.load_weights(list(weights.items()))
    for name in list(weights):  # until here MLX has read headers only; one by one, no two are in memory twice
        _read_now(weights.pop(name), name, source.place)
    model.eval()
    return model


def _read_now(weight: mx.array, name: str, place: Path) -> None:
    try:
        mx.eval(weight)
    except RuntimeError as error:
        raise ModelFolderError(f"{place}: the weights cannot be read ({error}); fetch them again") from error
    if not is_finite(weight):
        remedy = "take the weights from before the training went wrong, or fetch them again"
        if weight.dtype == mx.float16:
            remedy = "float16 ends at 65504: try bfloat16"
        raise ModelFolderError(f"{place}: {name}: expected numbers, found NaN or infinity as {weight.dtype}; {remedy}")


def is_finite(x: mx.array) -> bool:
    """Whether all are numbers. On a CPU by NumPy, a hundred times as fast: 0.04 s for the 124 million of GPT-2."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return True
    if not on_cpu():
        return bool(mx.isfinite(x).all())
    if x.dtype == mx.bfloat16:  # which NumPy has not: a number unless all bits of the exponent are set
        return not ((np.array(mx.view(x, mx.uint16), copy=False) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(np.array(x, copy=False)).all())


def read_tokenizer(folder: PathLike, config: GPTConfig) -> Tokenizer:
    """The tokenizer of a folder; where it has none and the model has GPT-2's vocabulary, GPT-2's.

    A vocabulary may be padded: the model may have more ids than the tokenizer, never fewer.
    """
    if any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        tokenizer = Tokenizer.from_folder(folder)
    elif 50257 <= config.vocab_size < 50257 + 256:  # GPT-2's own, perhaps padded to a round number
        tokenizer = Tokenizer.gpt2()
    else:
        raise ModelFolderError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found none of them, and "
            f"{config.vocab_size} ids are not GPT-2's 50257; copy the files from where the model was trained"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFolderError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} ids, the model's vocabulary, found "
            f"{tokenizer.vocab_size}; take the tokenizer's files from where the model was trained"
        )
    return tokenizer


def save(model: GPT, tokenizer: Tokenizer, folder: PathLike) -> None:
    """Write a model folder that ``load``, transformers and mlx-lm read. Creates it, or replaces the model in it.

    All is first written to a hidden folder inside and forced onto the disk; then the files move in, the weights last.
    If anything fails, the earlier model is as it was. Other files in the folder stay, but for an earlier model's
    ``LEFTOVERS``. Raises ``ModelFolderError``.
    """
    weights = to_hub(dict(tree_flatten(model.parameters())))
    check_weights(weights, model.config)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelFolderError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            f"save a model with the tokenizer it was trained with"
        )
    _write(Path(folder), weights, model.config, tokenizer)


def convert(source: ModelSource, folder: PathLike, dtype: mx.Dtype | None = None, bits: int | None = None) -> None:
    """Write the model folder of a source; one tensor after the other is in memory. The folder must be new, or empty.

    ``dtype``: of every tensor; None leaves each as it is. ``bits``: 8 or 4 pack the matrices, as ``quantize`` does, in
    mlx-lm's layout. Raises ``ModelFolderError``, and ``UsageError`` where the widths do not let themselves be packed.
    """
    folder = check_new(folder)
    tokenizer = read_tokenizer(source.place, source.config)
    if source.packing:
        raise ModelFolderError(
            f"{source.place}: is quantized already; convert the model in floats that it was made from"
        )
    packing = None if bits is None else Quantization(64, bits)
    if packing:
        check_quantizable(source.config, packing.bits)
    weights = pack(source.parameters(dtype), packing) if packing else source.tensors(dtype)
    _write(
        folder, weights, source.config, tokenizer, packing, lambda weight, name: _read_now(weight, name, source.place)
    )


def check_new(folder: PathLike) -> Path:
    """A folder to write a model into that is not there yet, or empty: no model is lost by a slip. ``UsageError``."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; choose a new folder, or remove it")
    return folder


def _write(
    folder: Path,
    weights: Weights,
    config: GPTConfig,
    tokenizer: Tokenizer,
    packing: Quantization | None = None,
    look: Callable[[mx.array, str], None] = lambda *_: None,
) -> None:
    dtype = next(weight.dtype for weight in weights.values() if weight.dtype != mx.uint32)
    try:
        with _staging(folder) as staging:
            tokenizer.save(staging)
            (staging / CONFIG).write_text(config_json(config, tokenizer.eot_id, dtype, packing), encoding="utf-8")
            write_safetensors(staging / WEIGHTS, weights, {"format": "mlx" if packing else "pt"}, look)
            check_safetensors(staging / WEIGHTS)  # a full disk may not have been reported
            small = sorted(file.name for file in staging.iterdir() if file.name != WEIGHTS)
            _move_in([*small, WEIGHTS], staging, folder)
    except (OSError, RuntimeError) as error:
        raise ModelFolderError(
            f"{folder}: the model could not be saved ({error}); make room or choose another folder, "
            f"what was there before is untouched"
        ) from error


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside ``folder``, gone afterwards; so is ``folder`` if it was made here and stayed empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _move_in(names: list[str], staging: Path, folder: Path) -> None:
    """Replace the files of ``folder`` by those of ``staging``: all of them or, on an error, none."""
    for name in names:
        fsync(staging / name)
    earlier = staging / "earlier"
    earlier.mkdir()
    for name in names[:-1]:  # the last, the weights, is what the others wait for: once it has moved, nothing can fail
        if (folder / name).exists():
            shutil.copy2(folder / name, earlier)
    try:
        for name in names:
            os.replace(staging / name, folder / name)
    except BaseException:
        for name in names[:-1]:
            if (earlier / name).exists():
                os.replace(earlier / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    for pattern in LEFTOVERS:
        for leftover in folder.glob(pattern):
            leftover.unlink()
    fsync(folder)
