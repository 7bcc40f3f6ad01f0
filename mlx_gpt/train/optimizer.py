"""What moves the weights: AdamW as GPT-2's successors use it, or Muon for the matrices inside the blocks."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
SMALL = 1 << 16  # weights of a matrix that goes through Muon's iteration with others of its shape
WSD_DECAY = 0.4  # share of the run in which wsd decays


def make_optimizer(
    kind: str = "adamw",
    learning_rate: float = 1e-3,
    muon_learning_rate: float = 0.02,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    muon_embeddings: bool = False,
    muon_iterations: int = 5,
    n_head: int = 1,
) -> optim.MultiOptimizer:
    """AdamW with bias correction, its decay on matrices only: norms and biases have no reason to be small.

    With ``muon`` the matrices of the blocks take steps with all singular values nearly equal (Jordan et al. 2024), of
    length ``muon_learning_rate``, by ``muon_iterations`` of Newton and Schulz; the rest stays with AdamW. In
    ``attn.c_attn`` the query, key and value of each of ``n_head`` heads are matrices of their own.
    ``muon_embeddings`` counts the token embedding among those matrices: AdamW moves the rows of a small vocabulary
    together and drowns what tells one name from another, which a head that copies names depends on. For a large
    vocabulary that is slow.
    """

    def adamw(decay: float) -> optim.AdamW:
        return optim.AdamW(learning_rate, betas=list(betas), eps=1e-8, weight_decay=decay, bias_correction=True)

    groups: list[optim.Optimizer] = [adamw(weight_decay), adamw(0.0)]
    filters = [_is_matrix]
    if kind == "muon":
        inside = ("h.", "wte") if muon_embeddings else ("h.",)
        settings: dict = {"momentum": 0.95, "weight_decay": 0.0, "ns_steps": muon_iterations}
        groups[:0] = [
            StackedMuon(muon_learning_rate, 3 * n_head, **settings),
            StackedMuon(muon_learning_rate, 1, **settings),
        ]
        filters[:0] = [
            lambda path, weight: path.endswith("attn.c_attn.weight"),
            lambda path, weight: _is_matrix(path, weight) and path.startswith(inside),
        ]
    elif kind != "adamw":
        raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {kind!r}")
    return optim.MultiOptimizer(groups, filters)


def _is_matrix(path: str, weight: mx.array) -> bool:
    return weight.ndim >= 2


class StackedMuon(optim.Muon):
    """Muon for weights (n x rows, columns) that are ``n`` matrices one below the other, each taken for itself.

    ``attn.c_attn`` is: queries, keys and values, and of each the heads. Made orthogonal as one matrix, those with the
    larger gradients, at first the values, would leave the others next to nothing. It is also less work. Small weights
    of one shape go through the iteration together: it takes longer to begin their products than to compute them.
    """

    def __init__(self, learning_rate: float, n: int, **settings: Any):
        super().__init__(learning_rate, **settings)
        self.n = n

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The new parameters: momentum (Nesterov's), then steps whose singular values are near one."""
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        updates: Any = tree_flatten(tree_map(self._update, gradients, self.state))
        together: dict[Any, list[tuple[str, mx.array]]] = {}
        for name, update in updates:
            together.setdefault(update.shape if update.size <= SMALL else name, []).append((name, update))
        steps = {name: step for some in together.values() for name, step in self._steps(some)}
        unfolded = tree_unflatten([(name, steps[name]) for name, _ in updates])
        return tree_map(lambda step, parameter: parameter - step, unfolded, parameters)

    def _update(self, gradient: mx.array, state: dict) -> mx.array:
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        return self.momentum * state["v"] + (1 - self.momentum) * gradient

    def _steps(self, updates: list[tuple[str, mx.array]]) -> list[tuple[str, mx.array]]:
        """How far the weights with these updates, all of one shape, go; a high matrix further, as in MLX's Muon."""
        names, arrays = zip(*updates, strict=True)
        shape = arrays[0].shape
        stack = mx.concatenate([one.reshape(self.n, -1, shape[-1]) for one in arrays])  # (n x weights, rows, columns)
        rate = self.learning_rate.astype(stack.dtype) * max(1.0, stack.shape[-2] / stack.shape[-1]) ** 0.5
        steps = mx.split(rate * orthogonalized(stack, self.ns_steps), len(arrays))
        return [(name, step.reshape(shape)) for name, step in zip(names, steps, strict=True)]


def orthogonalized(x: mx.array, iterations: int) -> mx.array:
    """Matrices (..., rows, columns) with the same singular vectors, but all singular values near one.

    Newton and Schulz's iteration with Jordan's coefficients (Jordan et al. 2024): five of them leave the values
    between 0.7 and 1.2.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalized(x.swapaxes(-1, -2), iterations).swapaxes(-1, -2)
    x = x / (mx.sqrt((x * x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(iterations):
        a = x @ x.swapaxes(-1, -2)
        b = mx.addmm(a, a, a, alpha=2.0315, beta=-4.7750)
        x = mx.addmm(x, b, x, beta=3.4445)
    return x


class Schedule:
    """Scales every learning rate of an optimizer: up in a line during warm-up, later down to ``final`` of the peak.

    ``cosine`` falls from the end of the warm-up on (Loshchilov & Hutter 2017; Radford et al. 2018, section 4.1);
    ``wsd``, warm-up, stable, decay, stays at the peak until the last 40 % and then falls in a line (Hu et al. 2024).
    Set from outside, by the share of the run that is done: so a run may last a number of steps or of minutes.
    """

    def __init__(self, optimizer: optim.MultiOptimizer, kind: str = "cosine", warmup: float = 0.02, final: float = 0.1):
        if kind not in SCHEDULES:
            raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, not {kind!r}")
        self.kind = kind
        self.optimizers = optimizer.optimizers
        self.peaks = [float(one.learning_rate.item()) for one in self.optimizers]
        self.warmup, self.final = warmup, final

    def factor(self, done: float) -> float:
        """What the peaks are multiplied by when the share ``done`` (0 to 1) of the run is behind."""
        if done < self.warmup:
            return done / self.warmup
        if self.kind == "wsd":
            left = min(1.0, max(0.0, 1 - done) / WSD_DECAY)
        else:
            left = 0.5 * (1 + cos(pi * min(1.0, (done - self.warmup) / (1 - self.warmup))))
        return self.final + (1 - self.final) * left

    def set(self, done: float) -> float:
        """Set the learning rates; returns AdamW's."""
        return self.scale(self.factor(done))

    def scale(self, factor: float) -> float:
        """Set them to so many times their peaks; returns AdamW's."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.learning_rate = peak * factor
        return self.peaks[-1] * factor
