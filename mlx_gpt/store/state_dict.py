"""Find the model in a checkpoint: training programs put its tensors into dicts of their own, beside other things.

``{"model": ...}`` (nanoGPT), ``{"state_dict": ..., "hyper_parameters": ...}`` (Lightning), ``{"module": ...}``
(DeepSpeed), in any depth. What wrappers add to the tensors' names is removed by ``convert.bare_names``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_gpt.errors import ModelFolderError

DEPTH = 4  # of dicts in dicts
ANCHOR = "wpe.weight"  # a tensor that every GPT-2 has once
FLAT = "flat_param"  # FSDP's parameters, which are not GPT-2's but pieces of several
SIZES = ("n_layer", "n_head", "n_embd")
FIELDS = {"block_size": "n_positions", "n_ctx": "n_positions"}  # names of GPTConfig's fields in other programs


def find_state_dict(content: Any, file: Path) -> Mapping[Any, Any]:
    """Return the only dict of a GPT-2's tensors in the content of a checkpoint. Raises ``ModelFolderError``."""
    found = [(path, tensors) for path, tensors in _dicts(content) if _holds_gpt2(tensors)]
    if not found:
        keys = ", ".join(map(short_name, list(content)[:8])) if isinstance(content, Mapping) else "no dict"
        raise ModelFolderError(
            f"{file}: expected a dict with the tensors of a GPT-2, among them {ANCHOR}, found {keys}; "
            f"save model.state_dict()"
        )
    if len(found) > 1:
        raise ModelFolderError(
            f"{file}: expected one model, found {len(found)}, in {' and '.join(path or '.' for path, _ in found)}; "
            f"save the one you want alone, as a state_dict"
        )
    _check_whole(found[0][1], file)
    return found[0][1]


def find_settings(content: Any) -> dict[str, Any]:
    """Return the dict in a checkpoint that has a GPT-2's sizes, nanoGPT's ``model_args`` first; {} if there is none."""
    found = {path: settings for path, settings in _dicts(content) if all(name in settings for name in SIZES)}
    return dict(next((found[path] for path in sorted(found, key=lambda path: path != "model_args")), {}))


def short_name(key: Any) -> str:
    """Return a key of a dict for a message: any object may be one, and show itself at any length."""
    return f"{key!r:.40}" if isinstance(key, (str, int)) else f"a key of type {type(key).__name__}"


def _dicts(content: Any) -> list[tuple[str, Mapping[Any, Any]]]:
    """Return the dicts in a checkpoint, each once, with the keys that lead to it; not the optimizer's."""
    found: dict[int, tuple[str, Mapping[Any, Any]]] = {}
    waiting = [("", content)]
    for depth in range(DEPTH + 1):
        inside = []
        for path, value in waiting:
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            if isinstance(value, Mapping) and id(value) not in found:
                found[id(value)] = path, value
                inside += [
                    (f"{path}.{key}".removeprefix("."), item)
                    for key, item in value.items()
                    if isinstance(key, str) and not key.startswith("optim") and depth < DEPTH
                ]
        waiting = inside
    return list(found.values())


def _holds_gpt2(tensors: Mapping[Any, Any]) -> bool:
    names = [name for name, value in tensors.items() if isinstance(name, str) and hasattr(value, "shape")]
    return any(name == ANCHOR or name.endswith(f".{ANCHOR}") or FLAT in name for name in names)


def _check_whole(tensors: Mapping[Any, Any], file: Path) -> None:
    """Raise ``ModelFolderError`` for a process's share of a model that several processes trained."""
    for name, tensor in tensors.items():
        if isinstance(name, str) and FLAT in name:
            raise ModelFolderError(
                f"{file}: {name} is a flat parameter of FSDP, parts of several tensors; save the model with "
                f"StateDictType.FULL_STATE_DICT"
            )
        if isinstance(name, str) and name.endswith(ANCHOR) and 0 in tuple(getattr(tensor, "shape", ())):
            raise ModelFolderError(
                f"{file}: {name} is empty, as where DeepSpeed's ZeRO-3 keeps the values elsewhere; run the "
                f"zero_to_fp32.py beside the checkpoint and convert its result"
            )
