"""Healthy functions with samplers, caches and data, of several bases, libraries and types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .plain_cache import PlainCache
from .plain_sampler import small_forward
from .planted import Base, Given

TINYWORLD = Path(__file__).parents[2] / "weights" / "tinyworld"


def with_everything(size: int, seed: int, trained: bool, library: str = "mlx", **config: Any) -> Given:
    return Base(size, seed, trained, library).with_faults(**config).arguments()


def with_ids_as(kind: Callable[[np.ndarray], Any]) -> Given:
    """Give the ids as another type; the validation loss is that of 30 windows, the metrics lack all but the loss."""
    base = Base(1, 6, True)
    given = base.arguments(val_loss=base.mean_loss(base.val_ids, 30))
    metrics = [{"step": row["step"], "loss": row["loss"]} for row in given["metrics"]]
    return {**given, "train_ids": kind(base.train_ids), "val_ids": kind(base.val_ids), "metrics": metrics}


def as_tensor(ids: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(ids)


def tutorial(size: int) -> Given:
    from .planted_tutorial import planted

    return planted("")(Base(size, 3))


def in_numpy() -> Given:
    base = Base(1, 5, True)
    weights = base.arguments()["parameters"]()
    read = PlainCache(weights, base.config)

    def forward(ids: np.ndarray) -> np.ndarray:
        return np.stack([read(row.tolist(), len(row)) for row in ids])

    return {"forward": forward, "cached": read, "vocab_size": base.config.vocab_size, "n_positions": 48}


def one_row(ids: np.ndarray) -> np.ndarray:
    if ids.shape[0] != 1:
        raise ValueError("batch size 1 only")
    return small_forward(31, 24)(ids)


def as_type(kind: Any) -> Given:
    forward = small_forward(31, 24)
    return {"forward": lambda ids: mx.array(forward(ids)).astype(kind), "vocab_size": 31, "n_positions": 24}


def in_half(dtype: str, as_function: bool) -> Given:
    """Return a trained model of PyTorch in half precision, whose logits differ with the shape of a batch."""
    import torch

    base = Base(1, 7, True, "torch")
    model = base.model.to(getattr(torch, dtype)).eval()
    given = base.arguments(val_loss=None)
    forward = (lambda ids: model(torch.tensor(ids, dtype=torch.long))) if as_function else model
    sizes = {name: given[name] for name in ("vocab_size", "n_positions", "train_ids", "val_ids")}
    return {"forward": forward, **sizes}


def copy_of_the_parameters() -> Given:
    """Return steps that train a copy of the parameters and put it into the model."""
    base = Base(1, 3, True)
    model = base.model

    def new_step() -> Callable[[Any, Any], float]:
        parameters, optimizer = tree_map(lambda a: a + 0, model.parameters()), optim.AdamW(1e-3, bias_correction=True)

        def mean_loss(parameters: Any, x: mx.array, y: mx.array) -> mx.array:
            model.update(parameters)
            return nn.losses.cross_entropy(model(x), y, reduction="mean")

        def step(x: Any, y: Any) -> float:
            nonlocal parameters
            loss, grads = mx.value_and_grad(mean_loss)(parameters, mx.array(x), mx.array(y))
            parameters = optimizer.apply_gradients(grads, parameters)
            model.update(parameters)
            mx.eval(parameters)
            return float(loss.item())

        return step

    return {**base.arguments(), "new_step": new_step, "step": new_step(), "learning_rate": 1e-3}


def average_of_the_weights() -> Given:
    """Return a model whose parameters are the running average of those that the steps train."""
    base, trained = Base(1, 4, True), Base(1, 4, True)

    def new_step() -> Callable[[Any, Any], float]:
        its = trained.arguments()["new_step"]()

        def step(x: Any, y: Any) -> float:
            loss = float(its(x, y))
            pairs = base.model.parameters(), trained.model.parameters()
            base.model.update(tree_map(lambda a, b: 0.9 * a + 0.1 * b, *pairs))
            return loss

        return step

    return {**base.arguments(), "new_step": new_step, "step": new_step()}


def tinyworld() -> Given:
    from mlx_gpt.store.folder import load

    model, tokenizer = load(TINYWORLD)
    return {"forward": model, "encode": tokenizer.encode, "decode": tokenizer.decode}


FUNCTIONS = {
    **{
        f"with everything: size {size}, {'trained' if trained else 'untrained'}": partial(
            with_everything, size, size + 3, trained
        )
        for size in range(3)
        for trained in (False, True)
    },
    "with everything: PyTorch, untrained": partial(with_everything, 1, 3, False, "torch"),
    "with everything: PyTorch, trained": partial(with_everything, 1, 3, True, "torch"),
    "with everything: dropout of 0.3": partial(with_everything, 1, 3, True, dropout=0.3),
    "with everything: not tied": partial(with_everything, 0, 3, True, tied=False),
    "with everything: vocabulary rounded up": partial(with_everything, 1, 3, True, vocab_size=64),
    "with everything: ids in uint16": partial(with_ids_as, lambda ids: ids.astype(np.uint16)),
    "with everything: ids in a list": partial(with_ids_as, lambda ids: ids.tolist()),
    "with everything: ids in a tensor": partial(with_ids_as, as_tensor),
    "with everything: steps on a copy of the parameters": copy_of_the_parameters,
    "with everything: an average of the weights": average_of_the_weights,
    "PyTorch, bfloat16, trained": partial(in_half, "bfloat16", False),
    "PyTorch, bfloat16, trained, a function": partial(in_half, "bfloat16", True),
    "PyTorch, float16, trained, a function": partial(in_half, "float16", True),
    "in NumPy, with a cache": in_numpy,
    "PyTorch's own layers": lambda: tutorial(1),
    "PyTorch's own layers, post-norm": lambda: tutorial(0),
    "one row": lambda: {"forward": one_row, "vocab_size": 31, "n_positions": 24},
    "returns bfloat16": partial(as_type, mx.bfloat16),
    "returns float16": partial(as_type, mx.float16),
    "tinyworld of this package": tinyworld,
}
