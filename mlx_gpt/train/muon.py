"""Muon: momentum whose updates are orthogonalized, for the matrices inside the blocks (Jordan et al. 2024)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

SMALL = 1 << 16  # elements; matrices up to this size are orthogonalized together with others of their shape


class StackedMuon(optim.Muon):
    """Muon for weights (n x rows, columns) that stack ``n`` matrices, each orthogonalized separately.

    ``attn.c_attn`` stacks queries, keys and values, and within each the heads. Orthogonalized as one matrix, the parts
    with the larger gradients, at first the values, would leave the others almost no update. Small weights of one shape
    are orthogonalized in one batch, because starting such small products takes longer than computing them.
    """

    def __init__(self, learning_rate: float, n: int, **settings: Any):
        super().__init__(learning_rate, **settings)
        self.n = n

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters: Nesterov momentum, then orthogonalized updates."""
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        momenta: Any = tree_flatten(tree_map(self._momentum, gradients, self.state))
        batches: dict[Any, list[tuple[str, mx.array]]] = {}
        for name, momentum in momenta:
            batches.setdefault(momentum.shape if momentum.size <= SMALL else name, []).append((name, momentum))
        updates = {name: update for batch in batches.values() for name, update in self._updates(batch)}
        tree = tree_unflatten([(name, updates[name]) for name, _ in momenta])
        return tree_map(lambda update, parameter: parameter - update, tree, parameters)

    def _momentum(self, gradient: mx.array, state: dict) -> mx.array:
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        return self.momentum * state["v"] + (1 - self.momentum) * gradient

    def _updates(self, momenta: list[tuple[str, mx.array]]) -> list[tuple[str, mx.array]]:
        """Updates of weights of one shape; tall matrices have a higher learning rate, as in MLX's Muon."""
        names, arrays = zip(*momenta, strict=True)
        shape = arrays[0].shape
        stack = mx.concatenate([one.reshape(self.n, -1, shape[-1]) for one in arrays])  # (n x weights, rows, columns)
        rate = self.learning_rate.astype(stack.dtype) * max(1.0, stack.shape[-2] / stack.shape[-1]) ** 0.5
        updates = mx.split(rate * orthogonalize(stack, self.ns_steps), len(arrays))
        return [(name, update.reshape(shape)) for name, update in zip(names, updates, strict=True)]


def orthogonalize(x: mx.array, iterations: int) -> mx.array:
    """Return matrices (..., rows, columns) with the same singular vectors and all singular values near one.

    Newton-Schulz iteration with the coefficients of Jordan et al. (2024): after five iterations the singular values lie
    between 0.7 and 1.2.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.swapaxes(-1, -2), iterations).swapaxes(-1, -2)
    x = x / (mx.sqrt((x * x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(iterations):
        a = x @ x.swapaxes(-1, -2)
        b = mx.addmm(a, a, a, alpha=2.0315, beta=-4.7750)
        x = mx.addmm(x, b, x, beta=3.4445)
    return x
