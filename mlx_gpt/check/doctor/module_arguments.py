"""Take the arguments of ``examine`` from a module of MLX or torch: forward passes, parameters, gradient, a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.modules import in_mode, is_mlx, is_torch, logits_of, replaced, sizes_of

LEARNING_RATE = 1e-3  # of the AdamW step that is made
TARGETS = ("targets", "target", "labels", "y")


def arguments_of(model: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the arguments of ``examine`` that a module gives, and its sizes where its config has them."""
    arguments = (of_mlx if is_mlx(model) else of_torch)(model)
    return {**arguments, "learning_rate": LEARNING_RATE, "module": model}, sizes_of(model)


def whole_logits(model: Any, ids: Any) -> Any:
    """Return the logits (B, T, V) of a module.

    Some modules, as nanoGPT's, return those of the last position only unless targets are given: the ids are given as
    targets. Others then return logits (B * T, V), which are reshaped.
    """
    logits = logits_of(model(ids))
    if tuple(logits.shape[:-1]) != tuple(ids.shape):
        names = inspect.signature(model.forward if is_torch(model) else model.__call__).parameters
        if target := next((name for name in names if name in TARGETS), None):
            logits = logits_of(model(ids, **{target: ids}))
    flat = len(logits.shape) == 2 and logits.shape[0] == ids.shape[0] * ids.shape[1]
    return logits.reshape(*ids.shape, -1) if flat else logits


def named(
    forward: Callable[[bool], Any], without_dropout: Any, gradient: Any, parameters: Any, load: Any, new_step: Any
) -> dict[str, Any]:
    """Return the functions of a module by the names of ``examine``'s arguments."""
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
