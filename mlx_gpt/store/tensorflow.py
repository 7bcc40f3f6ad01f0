"""OpenAI's release of GPT-2 for TensorFlow 1: ``hparams.json`` and a checkpoint, read without TensorFlow."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import read_small
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.model_config import CONFIG, config_of, read_json
from mlx_gpt.store.source import ModelSource
from mlx_gpt.store.tf_bundle import LIMIT, read_bundle

HPARAMS = "hparams.json"
# OpenAI's names of GPTConfig's fields.
FIELDS = {name: name for name in ("n_embd", "n_head", "n_layer")} | {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
PARTS = {"w": "weight", "g": "weight", "b": "bias"}  # model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight
OPTIMIZER_SLOT = re.compile(r".*/Adam(_\d+)?")


def is_tensorflow(path: Path) -> bool:
    """Return True for a folder with ``hparams.json`` and no ``config.json``."""
    return (path / HPARAMS).exists() and not (path / CONFIG).exists()


def read_tensorflow(folder: Path) -> ModelSource:
    """Read a folder; its tensors are mapped, in the hub's layout. Raises ``ModelFolderError``."""
    hparams = read_json(folder / HPARAMS)
    if hparams.keys() != FIELDS.keys():
        wrong = sorted(hparams.keys() ^ FIELDS.keys())[0]
        problem = "is a setting of another model" if wrong in hparams else "is missing"
        raise ModelFolderError(f"{folder / HPARAMS}: {wrong} {problem}; expected {', '.join(FIELDS)}")
    config = config_of(folder / HPARAMS, **{FIELDS[name]: value for name, value in hparams.items()})
    variables = read_bundle(find_checkpoint(folder))
    tensors = {
        hub_name(name): value[0] if value.ndim == 3 else value  # a matrix is a convolution of width 1
        for name, value in variables.items()
        if name.startswith("model/") and not OPTIMIZER_SLOT.fullmatch(name)
    }
    return ModelSource("TensorFlow", folder, config, mapped_arrays(tensors))


def hub_name(variable: str) -> str:
    """Return the hub's name: ``model/h0/ln_1/g`` -> ``h.0.ln_1.weight``, ``model/wte`` -> ``wte.weight``."""
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", variable.removeprefix("model/")).split("/")
    return ".".join([*path, PARTS[last]] if last in PARTS else [*path, last, "weight"])


def find_checkpoint(folder: Path) -> Path:
    """Return the index of the checkpoint that the file ``checkpoint`` names, or else of the only one."""
    indices = sorted(folder.glob("*.index"))
    file = folder / "checkpoint"
    try:
        text = read_small(file, LIMIT).decode("utf-8", "replace") if file.exists() else ""
    except OSError as error:
        raise ModelFolderError(f"{file}: cannot be read ({error.strerror}); remove it") from error
    named = re.search(r'^model_checkpoint_path: "(.*)"', text)
    chosen = [index for index in indices if named and index.stem == Path(named[1]).name] or indices
    if len(chosen) != 1:
        raise ModelFolderError(
            f"{folder}: expected one TensorFlow checkpoint, model.ckpt.index, found {len(chosen)}; "
            f"copy all files of the release into one folder"
        )
    return chosen[0]
