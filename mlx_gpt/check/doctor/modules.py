"""Modules of MLX or torch: their sizes and logits, and contexts that put their modes and gradients back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

SIZES = {
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
    "n_positions": (
        "n_positions",
        "block_size",
        "n_ctx",
        "max_position_embeddings",
        "context_length",
        "max_seq_len",
        "max_seq_length",
        "seq_len",
        "context_size",
        "max_length",
    ),
}
CONFIGS = ("config", "args", "cfg", "hparams")


def is_module(model: Any) -> bool:
    return is_mlx(model) or is_torch(model)


def is_mlx(model: Any) -> bool:
    nn = sys.modules.get("mlx.nn")
    return nn is not None and isinstance(model, nn.Module)


def is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def sizes_of(model: Any) -> dict[str, int]:
    """Return vocab_size and n_positions where the module or its config has them under a known name."""
    places = [getattr(model, name, None) for name in CONFIGS] + [model]
    sizes: dict[str, int] = {}
    for size, names in SIZES.items():
        for place in places:
            for name in names:
                value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    sizes.setdefault(size, value)
    return sizes


def logits_of(output: Any) -> Any:
    """Return the logits of what a forward pass returns: an array, a tuple or dict with them, or an object."""
    if isinstance(output, tuple):
        return next((part for part in output if len(getattr(part, "shape", ())) > 1), output)
    if isinstance(output, dict):
        return output.get("logits", output)
    return getattr(output, "logits", output)


@contextmanager
def kept(objects: Iterable[Any], *names: str) -> Iterator[None]:
    """Put the values of attributes back at the end."""
    before = [(owner, name, getattr(owner, name)) for owner in objects for name in names]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def replaced(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of all objects, and put the earlier values back at the end."""
    with kept(objects, name):
        for owner in objects:
            setattr(owner, name, value)
        yield


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """Set the mode of a module; put the modes of all its parts and their running means back at the end."""
    with kept(model.modules(), mode_name(model)), running_means_kept(model):
        model.train(training)
        yield


def mode_name(model: Any) -> str:
    return "_training" if is_mlx(model) else "training"


@contextmanager
def running_means_kept(model: Any) -> Iterator[None]:
    """Put the buffers of batch norms back at the end."""
    if is_mlx(model):
        norms = [part for part in model.modules() if "running_mean" in part]
        with kept(norms, "running_mean", "running_var"):
            yield
        return
    buffers = [
        (buffer, buffer.clone())
        for part in model.modules()
        if hasattr(part, "running_mean")
        for buffer in part.buffers()
    ]
    yield
    for buffer, before in buffers:
        buffer.data.copy_(before)


@contextmanager
def module_kept(model: Any) -> Iterator[None]:
    """Put the modes of a module back at the end; of a torch module also ``requires_grad`` and ``grad``."""
    with ExitStack() as stack:
        if model is not None:
            stack.enter_context(kept(model.modules(), mode_name(model)))
        if is_torch(model):
            stack.enter_context(kept(model.parameters(), "requires_grad", "grad"))
        yield
