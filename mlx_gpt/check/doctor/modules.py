"""Arguments of ``examine`` taken from a module of MLX or torch: forward passes, parameters, gradient, a step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy

LEARNING_RATE = 1e-3  # of the AdamW step that is made for a module
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
TARGETS = ("targets", "target", "labels", "y")


def is_module(model: Any) -> bool:
    return is_mlx(model) or is_torch(model)


def is_mlx(model: Any) -> bool:
    nn = sys.modules.get("mlx.nn")
    return nn is not None and isinstance(model, nn.Module)


def is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def arguments_of(model: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the arguments of ``examine`` that a module gives, and its sizes where its config has them."""
    arguments = (of_mlx if is_mlx(model) else of_torch)(model)
    return {**arguments, "learning_rate": LEARNING_RATE, "module": model}, sizes_of(model)


def sizes_of(model: Any) -> dict[str, int]:
    """Return vocab_size and n_positions where the module or its config has them under a known name."""
    places = [getattr(model, name, None) for name in CONFIGS] + [model]
    found: dict[str, int] = {}
    for size, names in SIZES.items():
        for place in places:
            for name in names:
                value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    found.setdefault(size, value)
    return found


def logits_of(output: Any) -> Any:
    """Return the logits of what a forward pass returns: an array, a tuple or dict with them, or an object."""
    if isinstance(output, tuple):
        return next((part for part in output if len(getattr(part, "shape", ())) > 1), output)
    if isinstance(output, dict):
        return output["logits"]
    return getattr(output, "logits", output)


def whole_logits(model: Any, ids: Any) -> Any:
    """Return logits (B, T, V), by giving targets to a model that returns the last position only without them.

    As nanoGPT's does; others return logits (B * T, V) with targets.
    """
    logits = logits_of(model(ids))
    if tuple(logits.shape[:-1]) != tuple(ids.shape):
        names = inspect.signature(model.forward if is_torch(model) else model.__call__).parameters
        if target := next((name for name in names if name in TARGETS), None):
            logits = logits_of(model(ids, **{target: ids}))
    flat = len(logits.shape) == 2 and logits.shape[0] == ids.shape[0] * ids.shape[1]
    return logits.reshape(*ids.shape, -1) if flat else logits


@contextmanager
def kept(objects: Iterable[Any], *names: str) -> Iterator[None]:
    """Put the values of attributes back at the end."""
    before = [(one, name, getattr(one, name)) for one in objects for name in names]
    try:
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)


@contextmanager
def replaced(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of all objects, and put the earlier values back at the end."""
    with kept(objects, name):
        for one in objects:
            setattr(one, name, value)
        yield


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """Set the mode of a module, and put back that of each of its parts, and what running means saw."""
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
        (one, one.clone()) for part in model.modules() if hasattr(part, "running_mean") for one in part.buffers()
    ]
    yield
    for one, before in buffers:
        one.data.copy_(before)


@contextmanager
def module_kept(model: Any) -> Iterator[None]:
    """Put the modes of a module back at the end, and of a torch module which parameters are trained, and gradients."""
    with ExitStack() as stack:
        if model is not None:
            stack.enter_context(kept(model.modules(), mode_name(model)))
        if is_torch(model):
            stack.enter_context(kept(model.parameters(), "requires_grad", "grad"))
        yield


def named(
    forward: Callable[[bool], Any], without_dropout: Any, gradient: Any, parameters: Any, load: Any, new_step: Any
) -> dict[str, Any]:
    """Return the functions of a module by the names that ``examine`` gives them."""
    return {
        "forward": forward(False),
        "forward_training": forward(True),
        "forward_without_dropout": without_dropout,
        "gradient": gradient,
        "parameters": parameters,
        "load_parameters": load,
        "new_step": new_step,
        "step": new_step(),
    }


def of_mlx(model: Any) -> dict[str, Any]:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten, tree_unflatten

    def forward(training: bool) -> Callable[[np.ndarray], np.ndarray]:
        def run(ids: np.ndarray) -> np.ndarray:
            with in_mode(model, training):
                return as_numpy(whole_logits(model, mx.array(ids)))

        return run

    def without_dropout(ids: np.ndarray) -> np.ndarray:
        layers = [module for module in model.modules() if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d))]
        with replaced(layers, "_p_1", 1):  # the share that is kept
            return forward(False)(ids)

    def mean_loss(x: mx.array, y: mx.array) -> mx.array:
        logits = whole_logits(model, x).astype(mx.float32)
        return nn.losses.cross_entropy(logits, y, reduction="mean")

    value_and_grad = nn.value_and_grad(model, mean_loss)

    def gradient(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        with in_mode(model, False):
            _, grads = value_and_grad(mx.array(x), mx.array(y))
            return {name: as_numpy(grad) for name, grad in dict(tree_flatten(grads)).items()}

    def parameters() -> dict[str, np.ndarray]:
        return {name: as_numpy(value) for name, value in dict(tree_flatten(model.parameters())).items()}

    def load_parameters(values: dict[str, np.ndarray]) -> None:
        current: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        model.update(
            tree_unflatten([(name, mx.array(value).astype(current[name].dtype)) for name, value in values.items()])
        )
        mx.eval(model.parameters())

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        optimizer = optim.AdamW(LEARNING_RATE, weight_decay=0.0, bias_correction=True)

        def step(x: np.ndarray, y: np.ndarray) -> float:
            loss, grads = value_and_grad(mx.array(x), mx.array(y))
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
            return float(loss.item())

        return step

    return named(forward, without_dropout, gradient, parameters, load_parameters, new_step)


def of_torch(model: Any) -> dict[str, Any]:
    import torch

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def tensor(ids: np.ndarray) -> Any:
        return torch.from_numpy(np.asarray(ids, np.int64)).to(device)

    def run_in(training: bool, ids: Any) -> Any:
        with in_mode(model, training):
            return whole_logits(model, ids)

    def forward(training: bool) -> Callable[[np.ndarray], np.ndarray]:
        def run(ids: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return as_numpy(run_in(training, tensor(ids)))

        return run

    def without_dropout(ids: np.ndarray) -> np.ndarray:
        layers = [module for module in model.modules() if isinstance(module, torch.nn.modules.dropout._DropoutNd)]
        with replaced(layers, "p", 0.0):
            return forward(False)(ids)

    def mean_loss(x: np.ndarray, y: np.ndarray, training: bool) -> Any:
        logits = run_in(training, tensor(x))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tensor(y).flatten())

    def gradient(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with torch.enable_grad():
            grads = torch.autograd.grad(mean_loss(x, y, False), [p for _, p in named], allow_unused=True)
        return {
            name: np.zeros(tuple(p.shape), np.float32) if grad is None else as_numpy(grad)
            for (name, p), grad in zip(named, grads, strict=True)
        }

    def parameters() -> dict[str, np.ndarray]:
        return {name: as_numpy(value) for name, value in model.named_parameters()}

    def load_parameters(values: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(np.asarray(values[name])).to(parameter.dtype))

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

        def step(x: np.ndarray, y: np.ndarray) -> float:
            with torch.enable_grad():
                loss = mean_loss(x, y, True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return float(loss.item())

        return step

    return named(forward, without_dropout, gradient, parameters, load_parameters, new_step)
