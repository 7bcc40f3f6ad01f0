"""Gradients with respect to activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gpt.lens.hooks import Activations, Edit, Hooks
from mlx_gpt.lens.trace import forward, trace
from mlx_gpt.model.gpt import GPT

Metric = Callable[[mx.array], mx.array]  # logits (B, T, V) -> a number, as an array without axes


def gradients(
    model: GPT, tokens: Any, metric: Metric, names: str | Sequence[str], edits: Mapping[str, Edit] | None = None
) -> tuple[mx.array, Activations]:
    """Return a metric of the logits and its gradients with respect to activations, each in the activation's shape.

    The gradient is that of a number added to the activation after all edits: what the metric gains, per unit, if the
    rest of the model sees the activation changed. Masked attention scores have gradient 0. Raises ``UsageError`` like
    ``trace``.
    """
    pairs = list((edits or {}).items())
    _, activations = trace(model, tokens, edits, names)

    def value(added: dict[str, mx.array]) -> mx.array:
        adding = [(key, lambda x, name: x + added[name]) for key in added]
        return metric(forward(model, tokens, Hooks(model.config, [*pairs, *adding], ())))

    found, grads = mx.value_and_grad(value)({key: mx.zeros_like(x) for key, x in activations.items()})
    activations.update(grads)
    return found, activations


def logit_difference(correct: Any, wrong: Any, position: int = -1) -> Metric:
    """Return a metric: the logit of ``correct`` minus that of ``wrong`` at a position, averaged over the batch.

    Both are an id, or one for each row (B,).
    """
    right, other = mx.array(correct).reshape(-1, 1), mx.array(wrong).reshape(-1, 1)

    def metric(logits: mx.array) -> mx.array:
        at = logits[:, position].astype(mx.float32)  # (B, V)
        rows = (at.shape[0], 1)
        return (
            mx.take_along_axis(at, mx.broadcast_to(right, rows), axis=-1)
            - mx.take_along_axis(at, mx.broadcast_to(other, rows), axis=-1)
        ).mean()

    return metric
