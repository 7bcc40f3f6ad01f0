"""PyTorch's layouts: ``pytorch_model.bin``, whole or in shards, and the checkpoints of training programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.files import read_small
from mlx_gpt.store.convert import Weights, bare_names, is_buffer, is_linear
from mlx_gpt.store.huggingface import has_safetensors, read_shards
from mlx_gpt.store.model_config import CONFIG, config_of, read_config
from mlx_gpt.store.nanogpt import CHECKPOINT, add_biases, find_characters, read_model_args
from mlx_gpt.store.pickles import arrays_of, read_pickle
from mlx_gpt.store.source import ModelSource
from mlx_gpt.store.state_dict import FIELDS, find_settings, find_state_dict, short_name

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp")
MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")  # torch.save's zip, and before 1.6
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # of a hub model, whole or in shards
DEEPSPEED = "mp_rank_00_model_states.pt"  # in the folder that the file ``latest`` names
DISTRIBUTED = "*.distcp"
ZERO3 = "zero_pp_rank_*_model_states.pt"  # each a process's part of every tensor


def find_pickle(path: Path) -> Path | None:
    """Return the pickle that holds a model's weights, or the index of its shards; None if safetensors do."""
    if path.is_file():
        return path if path.suffix in SUFFIXES or _begins(path, MAGIC) else None
    if has_safetensors(path):
        return None
    names = PICKLES if (path / CONFIG).exists() else (CHECKPOINT,)
    found = next((path / name for name in names if (path / name).exists()), None) or _find_deepspeed(path)
    return found or next(chain(path.glob(DISTRIBUTED), path.glob(f"*/{DISTRIBUTED}")), None)


def read_pytorch(path: Path) -> ModelSource:
    """Read a file or a folder that ``find_pickle`` accepts. Takes torch. Raises ``ModelFolderError``."""
    file = find_pickle(path)
    assert file
    if file.name == PICKLES[1]:
        weights = read_shards(file, lambda shard: _tensors(read_pickle(shard), shard))
        return ModelSource("PyTorch", file.parent, read_config(file.parent), weights, is_linear(weights))
    _check_not_partitioned(file)
    content = read_pickle(file)
    folder, settings = _home(path, file), find_settings(content)
    is_nanogpt = isinstance(content, Mapping) and "model_args" in content
    config = read_model_args(content["model_args"], file) if is_nanogpt else None
    weights = _tensors(find_state_dict(content, file), file)
    config = config or _find_config(weights, settings, folder, file)
    if is_linear(weights) and not settings.get("bias", any(name.endswith(".bias") for name in weights)):
        weights = add_biases(weights, config)
    tokenizer = find_characters(folder, content) if is_nanogpt else None
    kind = "nanoGPT" if is_nanogpt else "PyTorch"
    return ModelSource(kind, folder, config, weights, is_linear(weights), tokenizer=tokenizer)


def _tensors(tensors: Mapping[Any, Any], file: Path) -> Weights:
    """Return the parameters among torch tensors."""
    if wrong := [name for name in tensors if not isinstance(name, str)]:
        raise ModelFolderError(
            f"{file}: expected the names of tensors, found {short_name(wrong[0])}; save a model's state_dict()"
        )
    return arrays_of({name: tensor for name, tensor in tensors.items() if not is_buffer(name)}, file)


def _find_config(weights: Weights, settings: dict[str, Any], folder: Path, file: Path) -> GPTConfig:
    """Return the architecture: that of a config.json, of settings in the file, or GPT-2's own by shape."""
    if (folder / CONFIG).exists():
        return read_config(folder)
    found = _shapes({short: weights[name] for name, short in bare_names(weights).items()}, file)
    named = {FIELDS.get(name, name): value for name, value in settings.items()}
    known: dict[str, Any] = {name: named[name] for name in UNSEEN if name in named}
    if not is_linear(weights):
        known = {"activation_function": "gelu_new"} | known  # of transformers' GPT2Config
        if n_head := PUBLISHED.get((found["n_layer"], found["n_embd"])):
            known = {"n_head": n_head} | known
    if missing := [name for name in ("n_head", "activation_function") if name not in known]:
        choices = {"n_head": "N", "activation_function": "gelu (nn.GELU()) or gelu_new (its tanh form)"}
        text = json.dumps(GPT2 | found | known | {name: choices[name] for name in missing})
        raise ModelFolderError(
            f"{file}: expected {' and '.join(missing)} in it or in a {CONFIG} beside it, which shapes do not tell; "
            f"write {folder / CONFIG}: {text}"
        )
    return config_of(file, **found, **known)


UNSEEN = ("n_head", "activation_function", "layer_norm_epsilon")  # settings that shapes do not tell
GPT2: dict[str, Any] = {"model_type": "gpt2"}
PUBLISHED = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # layers and width of GPT-2's sizes: heads


def _shapes(weights: Weights, file: Path) -> dict[str, Any]:
    """Return the settings that the shapes of a model's tensors tell."""
    names = {"wte.weight", "h.0.mlp.c_fc.weight", "wpe.weight"}
    head = weights.get("lm_head.weight")
    embedding = weights.get("wte.weight", head)
    if embedding is None or any(name not in weights or weights[name].ndim != 2 for name in names - {"wte.weight"}):
        raise ModelFolderError(f"{file}: expected {', '.join(sorted(names))}, not all are there; this is no GPT-2")
    T, C = weights["wpe.weight"].shape
    inner = weights["h.0.mlp.c_fc.weight"].size // C
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.") and name.split(".")[1].isdecimal()}
    found = {"vocab_size": embedding.shape[0], "n_positions": T, "n_embd": C, "n_layer": len(layers)}
    found |= {"n_inner": inner} if inner != 4 * C else {}
    is_tied = head is None or (head.shape == embedding.shape and bool(mx.array_equal(head, embedding)))
    return found if is_tied else found | {"tie_word_embeddings": False}


def _find_deepspeed(folder: Path) -> Path | None:
    """Return the model's file in a folder of DeepSpeed's checkpoints, or in one of them."""
    latest, step = folder / "latest", folder
    if latest.is_file():
        try:
            step = folder / Path(read_small(latest, 1000).decode("utf-8", "replace").strip()).name
        except OSError as error:
            raise ModelFolderError(f"{latest}: expected the name of a folder ({error.strerror}); remove it") from error
    states = sorted(step.glob("*_model_states.pt"))
    return next((file for file in states if file.name == DEEPSPEED), states[0] if states else None)


def _home(path: Path, file: Path) -> Path:
    """Return the folder of config.json and the tokenizer: for DeepSpeed's checkpoints the one above them."""
    above = file.parent.parent
    if file.name == DEEPSPEED and not (file.parent / CONFIG).exists() and (above / CONFIG).exists():
        return above
    return path if path.is_dir() else file.parent


def _check_not_partitioned(file: Path) -> None:
    if file.match(DISTRIBUTED):
        raise ModelFolderError(
            f"{file}: holds a part of a checkpoint of torch.distributed; merge the parts: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {file.parent} model.pt"
        )
    if file.match(ZERO3):
        raise ModelFolderError(
            f"{file}: holds one process's part of each tensor (DeepSpeed's ZeRO-3); run the zero_to_fp32.py beside "
            f"the checkpoint and convert its result"
        )
    if file.name == DEEPSPEED and (other := file.with_name("mp_rank_01_model_states.pt")).exists():
        raise ModelFolderError(f"{file}: holds a part of each tensor, {other.name} another; merge them first")


def _begins(file: Path, magic: tuple[bytes, ...]) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(max(map(len, magic))).startswith(magic)
    return False
