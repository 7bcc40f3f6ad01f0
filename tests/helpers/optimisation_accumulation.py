"""Gradients of several micro-batches that are added up wrongly, kept, or left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_unflatten

from .optimisation_training import RATE, Tree, adam, sgd, step_alone, trained_with
from .planted import Base, Given, Planted


def summed(count: int) -> Any:
    """Return losses and gradients of a batch in ``count`` parts, added up."""

    def gradients(value_and_grad: Any, x: mx.array, y: mx.array) -> tuple[mx.array, Tree]:
        n = max(len(x) // count, 1)
        parts = [value_and_grad(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]
        loss, grads = parts[0]
        for more, others in parts[1:]:
            loss, grads = loss + more, tree_map(lambda a, b: a + b, grads, others)
        return loss, grads

    return gradients


def accumulated(count: int, scale: float, kept: int | None = None, rows: int = 0) -> Any:
    """Return gradients of a batch in ``count`` parts or some rows, added up and multiplied; or of one part alone."""

    def gradients(value_and_grad: Any, x: mx.array, y: mx.array) -> tuple[mx.array, Tree]:
        n = rows or max(len(x) // count, 1)
        parts = [value_and_grad(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]
        if kept is not None:
            return parts[kept]
        total = parts[0][1]
        for _, grads in parts[1:]:
            total = tree_map(lambda a, b: a + b, total, grads)
        return parts[-1][0], tree_map(lambda g: g * scale, total)

    return gradients


def over_calls(base: Base, clear: bool, calls: int = 4) -> Given:
    """Return a step of which each call adds a micro-batch, and every fourth one updates the parameters."""
    given, model = trained_with(base), base.model

    def new_step() -> Callable[[Any, Any], float]:
        its, sums, count = adam()(), {}, [0]

        def step(x: Any, y: Any) -> float:
            if clear:
                sums.clear()
            sums.update({name: sums.get(name, 0) + grad / calls for name, grad in given["gradient"](x, y).items()})
            count[0] += 1
            if count[0] % calls == 0:
                its.update(model, tree_unflatten(list(sums.items())))
                sums.clear()
            mx.eval(model.parameters(), its.state)
            return given["loss"](x, y)

        return step

    return {**given, "new_step": new_step, "step": new_step()}


def gradient_in_parts(base: Base, kept: int | None = None) -> Given:
    """Return a gradient of micro-batches of two rows: their sum, or that of one."""
    given = trained_with(base)

    def gradient(x: Any, y: Any) -> Tree:
        parts = [given["gradient"](x[i : i + 2], y[i : i + 2]) for i in range(0, len(x), 2)]
        return {name: sum(part[name] for part in parts) for name in parts[0]} if kept is None else parts[kept]

    return {**given, "gradient": gradient}


def never_cleared(optimizer: Callable[[], Any], each: bool) -> Callable[[Base], Given]:
    """Add each step's gradients to those before it: of one optimizer, or of all that there were."""

    def adding() -> Callable[[Tree], Tree]:
        sums: Tree = {}

        def change(grads: Tree) -> Tree:
            sums.update({name: sums.get(name, 0) + grad for name, grad in grads.items()})
            return dict(sums)

        return change

    def plant(base: Base) -> Given:
        if not each:
            return trained_with(base, optimizer=optimizer, change=adding())
        return trained_with(base) | {
            "new_step": lambda: trained_with(base, optimizer=optimizer, change=adding())["new_step"]()
        }

    return plant


FAULTS: dict[str, Planted] = {
    "parts not divided": Planted(
        "accumulation-differs", lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(4, 1.0))
    ),
    "parts of two rows not divided": Planted(
        "accumulation-differs", lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(1, 1.0, rows=2))
    ),
    "parts not divided, Adam": Planted(
        "accumulation-differs", lambda base: trained_with(base, gradients=summed(2), dropout=False)
    ),
    "gradients never cleared": Planted("accumulation-differs", never_cleared(adam(), each=True)),
    "gradients never cleared, momentum": Planted("accumulation-differs", never_cleared(sgd(momentum=0.9), each=True)),
    "gradients never cleared, descent": Planted("accumulation-differs", never_cleared(sgd(), each=True), sizes=(0,)),
    "gradients left over": Planted("accumulation-differs", never_cleared(adam(), each=False)),
    "gradients left over, descent": Planted("accumulation-differs", never_cleared(sgd(), each=False)),
    "only the last part": Planted(
        "accumulation-differs",
        lambda base: trained_with(base, gradients=accumulated(2, 1.0, kept=-1), dropout=False),
    ),
    "only the last part, with dropout": Planted(
        "accumulation-differs",
        lambda base: trained_with(base.with_faults(dropout=0.1), gradients=accumulated(2, 1.0, kept=-1)),
    ),
    "only the first part, step alone": Planted(
        "accumulation-differs", lambda base: step_alone(trained_with(base, gradients=accumulated(4, 1.0, kept=0)))
    ),
    "only the last call": Planted("accumulation-differs", lambda base: over_calls(base, clear=True)),
    "only the last call, step alone": Planted(
        "accumulation-differs", lambda base: step_alone(over_calls(base, clear=True))
    ),
    "parts of three rows": Planted(
        "accumulation-differs",
        lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(2, 1 / 3, rows=3)),
        sizes=(0, 2),  # without dropout
    ),
    "parts not divided, no gradient": Planted(
        "accumulation-differs",
        lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(4, 1.0)) | {"gradient": None},
        sizes=(0, 2),
    ),
    "gradients never cleared, Lion": Planted(
        "accumulation-differs", never_cleared(lambda: optim.Lion(RATE), each=True)
    ),
    "gradients never cleared, Lion, dropout": Planted(
        "accumulation-differs",
        lambda base: never_cleared(lambda: optim.Lion(RATE), each=True)(base.with_faults(dropout=0.1)),
    ),
    "gradients left over, Lion": Planted("accumulation-differs", never_cleared(lambda: optim.Lion(RATE), each=False)),
    "gradient of the last part": Planted("accumulation-differs", lambda base: gradient_in_parts(base, kept=-1)),
    "gradient of the first part": Planted("accumulation-differs", lambda base: gradient_in_parts(base, kept=0)),
    "gradient not divided": Planted("accumulation-differs", lambda base: gradient_in_parts(base)),
}
