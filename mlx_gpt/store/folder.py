"""Load and save model folders, the layout of transformers and mlx-lm: config.json, model.safetensors, tokenizer files.

``load`` refuses a file that is missing, cut short, or of another model, with one line. ``save`` writes to a hidden
folder inside the target and moves the files in once all of them are on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import ModelFolderError, UsageError
from mlx_gpt.files import check_replaceable, expand_user, fsync, hidden_folder, is_vacant
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import check_quantizable
from mlx_gpt.store.convert import Quantization, Weights, check_weights, hub_shapes, quantize_weights, to_hub
from mlx_gpt.store.huggingface import INDEX, WEIGHTS
from mlx_gpt.store.layouts import find_source, read_source
from mlx_gpt.store.model_config import CONFIG, config_json
from mlx_gpt.store.safetensors import check_safetensors, write_safetensors
from mlx_gpt.store.source import ModelSource
from mlx_gpt.text.characters import read_characters
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import has_vocabulary

PathLike = str | os.PathLike[str]

# Files of an earlier model that would affect the new one: mlx-lm reads every model*.safetensors, and the last three
# would change the tokenizer or its stop token.
STALE_FILES = ["model-*-of-*.safetensors", INDEX]
STALE_FILES += ["added_tokens.json", "special_tokens_map.json", "generation_config.json"]


def load(name: PathLike, revision: str | None = None, dtype: mx.Dtype = mx.float32) -> tuple[GPT, Tokenizer]:
    """Load the model and tokenizer of a folder, or of a hub repository (``load("openai-community/gpt2")``).

    Files of weights in other layouts are read as well (``store/layouts.py``). The model is in eval mode, its weights
    are in memory as ``dtype``. Raises ``ModelFolderError`` or ``TokenizerError``.
    """
    return load_source(find_source(name, revision), dtype)


def load_source(source: ModelSource, dtype: mx.Dtype = mx.float32) -> tuple[GPT, Tokenizer]:
    """Load the model of a source and the tokenizer beside it."""
    return build(source, dtype), tokenizer_of(source)


def read_model(folder: PathLike, dtype: mx.Dtype = mx.float32) -> GPT:
    """Return the model of a folder, in eval mode, without its tokenizer."""
    return build(read_source(Path(folder)), dtype)


def build(source: ModelSource, dtype: mx.Dtype = mx.float32) -> GPT:
    """Return the model of a source, in eval mode, its weights in memory."""
    weights = source.parameters(dtype)
    model = GPT(source.config)
    if source.quantization:
        nn.quantize(model, *source.quantization, class_predicate=lambda name, _: f"{name}.scales" in weights)
    model.load_weights(list(weights.items()))
    for name in list(weights):  # lazy until here; evaluated one by one, no two are in memory twice
        _evaluate(weights.pop(name), name, source.folder)
    model.eval()
    return model


def _evaluate(weight: mx.array, name: str, folder: Path) -> None:
    """Read a lazy tensor; raise ``ModelFolderError`` unless its values can be read and are finite."""
    try:
        mx.eval(weight)
    except RuntimeError as error:
        raise ModelFolderError(f"{folder}: the weights cannot be read ({error}); fetch them again") from error
    if not is_finite(weight):
        remedy = "use weights from before the training diverged, or fetch them again"
        if weight.dtype == mx.float16:
            remedy = "float16 ends at 65504: try bfloat16"
        raise ModelFolderError(f"{folder}: {name}: expected numbers, found NaN or infinity as {weight.dtype}; {remedy}")


def is_finite(x: mx.array) -> bool:
    """Return True if no value is NaN or infinite. On a CPU, NumPy is 100 times as fast as MLX."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return True
    if not on_cpu():
        return bool(mx.isfinite(x).all())
    if x.dtype == mx.bfloat16:  # which NumPy lacks: finite unless all bits of the exponent are set
        return not ((np.array(mx.view(x, mx.uint16), copy=False) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(np.array(x, copy=False)).all())


def tokenizer_of(source: ModelSource) -> Tokenizer:
    """Return the tokenizer in the weights' file, or else that of its folder. Raises ``ModelFolderError``."""
    if source.tokenizer is None:
        return read_tokenizer(source.folder, source.config)
    return check_vocab_size(source.tokenizer, source.config, source.folder)


def read_tokenizer(folder: PathLike, config: GPTConfig) -> Tokenizer:
    """Return the tokenizer of a folder, or GPT-2's if it has none and the model has GPT-2's vocabulary.

    The model may have more ids than the tokenizer (padding), never fewer. Raises ``ModelFolderError``.
    """
    tokenizer: Tokenizer
    if characters := read_characters(Path(folder)):
        tokenizer = characters
    elif has_vocabulary(Path(folder)):
        tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
    elif 50257 <= config.vocab_size < 50257 + 256:  # GPT-2's, perhaps padded
        tokenizer = Tokenizer.gpt2().with_settings(Path(folder), config.vocab_size)
    else:
        raise ModelFolderError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json (of nanoGPT meta.pkl), found none, and "
            f"{config.vocab_size} ids are not GPT-2's 50257; copy the files from where the model was trained"
        )
    return check_vocab_size(tokenizer, config, folder)


def check_vocab_size(tokenizer: Tokenizer, config: GPTConfig, folder: PathLike) -> Tokenizer:
    """Return a tokenizer. Raises ``ModelFolderError`` if it has more ids than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFolderError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} ids, the model's vocabulary, found "
            f"{tokenizer.vocab_size}; take the tokenizer's files from where the model was trained"
        )
    return tokenizer


def save(model: GPT, tokenizer: Tokenizer, folder: PathLike) -> None:
    """Write a model folder that ``load``, transformers and mlx-lm read; create it, or replace the model in it.

    If anything fails, the earlier model is unchanged. Other files stay, except ``STALE_FILES``. Raises
    ``ModelFolderError``.
    """
    weights = to_hub(dict(tree_flatten(model.parameters())))
    check_weights(weights, hub_shapes(model.config))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelFolderError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            f"save a model with the tokenizer it was trained with"
        )
    _write(Path(folder), weights, model.config, tokenizer)


def convert(source: ModelSource, folder: PathLike, dtype: mx.Dtype | None = None, bits: int | None = None) -> None:
    """Write the model folder of a source, one tensor in memory at a time. The folder must be new or empty.

    Casts every tensor to ``dtype``; None leaves each as it is. ``bits``, 8 or 4, quantizes the matrices in mlx-lm's
    layout. Raises ``ModelFolderError``, and ``UsageError`` if the widths cannot be quantized.
    """
    folder = check_new(folder)
    tokenizer = tokenizer_of(source)
    source.require_floats("convert")
    quantization = None if bits is None else Quantization(64, bits)
    if quantization:
        check_quantizable(source.config, quantization.bits)
        weights = quantize_weights(source.parameters(dtype), quantization)
    else:
        weights = source.hub_tensors(dtype)
    _write(folder, weights, source.config, tokenizer, quantization, partial(_evaluate, folder=source.folder))


def check_new(folder: PathLike) -> Path:
    """Return a folder that does not exist or is empty, so that no model is overwritten. Raises ``UsageError``."""
    folder = expand_user(folder)
    if not is_vacant(folder):
        raise UsageError(f"{folder} exists already; choose a new folder, or remove it")
    return folder


def _write(
    folder: Path,
    weights: Weights,
    config: GPTConfig,
    tokenizer: Tokenizer,
    quantization: Quantization | None = None,
    check: Callable[[mx.array, str], None] = lambda *_: None,
) -> None:
    dtype = next(weight.dtype for weight in weights.values() if weight.dtype != mx.uint32)
    try:
        with _staging(folder) as staging:
            tokenizer.save(staging)
            settings = config_json(config, tokenizer.end_ids, tokenizer.start_id, dtype, quantization)
            (staging / CONFIG).write_text(settings, encoding="utf-8")
            write_safetensors(staging / WEIGHTS, weights, {"format": "mlx" if quantization else "pt"}, check)
            check_safetensors(staging / WEIGHTS)  # a full disk may not have been reported
            small = sorted(file.name for file in staging.iterdir() if file.name != WEIGHTS)
            _move_in([*small, WEIGHTS], staging, folder)
    except (OSError, RuntimeError) as error:
        raise ModelFolderError(
            f"{folder}: the model could not be saved ({error}); make room or choose another folder; "
            f"its earlier files are unchanged"
        ) from error


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder inside ``folder``. Removes it at the end, and ``folder`` too if created here and empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hidden_folder(folder) as staging:
            yield staging
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _move_in(names: list[str], staging: Path, folder: Path) -> None:
    """Replace the files of ``folder`` by those of ``staging``: all of them or, on an error, none."""
    for name in names:
        fsync(staging / name)
        check_replaceable(folder / name)
    backup = staging / "backup"
    backup.mkdir()
    for name in names[:-1]:  # not the last, the weights: nothing can fail once they have moved
        if (folder / name).exists():
            shutil.copy2(folder / name, backup)
    try:
        for name in names:
            os.replace(staging / name, folder / name)
    except BaseException:
        for name in names[:-1]:
            if (backup / name).exists():
                os.replace(backup / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    for pattern in STALE_FILES:
        for stale in folder.glob(pattern):
            stale.unlink()
    fsync(folder)
