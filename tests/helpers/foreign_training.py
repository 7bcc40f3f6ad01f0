"""The text and the step of the GPTs that different people write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.tinyworld.stories import generate_stories

Given = dict[str, Any]
P = 24  # context
TEXT = "\n".join(generate_stories(200, seed=3))
CHARACTERS = sorted(set(TEXT))
V = len(CHARACTERS)
IDS = np.array([CHARACTERS.index(c) for c in TEXT], np.int32)


def batches(shift: int = 1, B: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(0, len(IDS) - P - 3, (B, 1)) + np.arange(P)
        yield IDS[rows], IDS[rows + shift]


def functions(model: nn.Module, mistake: str = "", lr: float = 1e-3) -> Given:
    """Return what a user of ``mlx.optimizers`` has: a loss, a step, parameters."""

    def mean_loss(x: mx.array, y: mx.array) -> mx.array:
        logits = model(x).astype(mx.float32)
        if mistake == "softmax before the loss":
            logits = mx.softmax(logits, axis=-1)
        if mistake == "loss shifts again":
            logits, y = logits[:, :-1], y[:, 1:]
        how = "sum" if mistake == "sum of the losses" else "mean"
        return nn.losses.cross_entropy(logits, y, reduction=how)

    value_and_grad = nn.value_and_grad(model, mean_loss)
    rate = {"lr 1": 1.0, "lr 1e-8": 1e-8}.get(mistake, lr)

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        corrected = mistake != "AdamW as MLX makes it"
        optimizer = optim.AdamW(rate, weight_decay=0.01, bias_correction=corrected)
        if mistake == "freezes all but the head":
            model.freeze()
            model.head.unfreeze()

        def step(x: np.ndarray, y: np.ndarray) -> float:
            loss, gradient = value_and_grad(mx.array(x), mx.array(y))
            if mistake != "update forgotten":
                optimizer.update(model, gradient)
            mx.eval(model.parameters(), optimizer.state)
            return loss.item()

        return step

    def parameters() -> Given:
        return {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(model.parameters())}

    def load(values: Given) -> None:
        model.update(tree_unflatten([(k, mx.array(v)) for k, v in values.items()]))

    return {
        "forward": lambda ids: model(mx.array(ids)),
        "loss": lambda x, y: mean_loss(mx.array(x), mx.array(y)).item(),
        "parameters": parameters,
        "load_parameters": load,
        "new_step": new_step,
        "step": new_step(),
        "learning_rate": rate,
        "batches": (lambda: batches(0)) if mistake == "targets are the inputs" else batches,
        "train_ids": IDS,
        "vocab_size": V,
        "n_positions": P,
    }
