"""A training step with a fresh optimizer: a new one, or the user's, put back to its state before the first step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.inside import referred
from mlx_gpt.check.doctor.modules import is_torch

Step = Callable[[np.ndarray, np.ndarray], float]


def fresh_step(case: Case) -> Step:
    """Return a step with a fresh optimizer; the user's ``step`` as it is where its optimizer cannot be put back."""
    if case.has("new_step"):
        function = case.call("new_step")
    elif case.has("step"):
        function = case.given["step"]
        for rewind in case.once(rewinds):
            rewind()
    else:
        raise NotApplicable("step")
    if not callable(function):
        raise CallFailed("new_step", "wrong-shape", f"new_step returned {type(function).__name__}; expected a step")
    return lambda x, y: case.number("step", x.copy(), y.copy(), function=function)


def is_fresh(case: Case) -> bool:
    """Return True if the optimizer of ``fresh_step`` has no memory of earlier steps."""
    return case.has("new_step") or bool(case.once(rewinds))


def rewinds(case: Case) -> list[Callable[[], None]]:
    """Return functions that put the optimizers, schedulers and scalers of ``step`` back to their state now."""
    functions: dict[int, Callable[[], None]] = {}
    mlx, torch = sys.modules.get("mlx.optimizers"), sys.modules.get("torch")
    for keeper in items(referred(case.given["step"])):
        if mlx is not None and isinstance(keeper, mlx.Optimizer):
            functions[id(keeper)] = rewind_of_mlx(keeper)
        elif torch and hasattr(keeper, "load_state_dict") and not (is_torch(keeper) or isinstance(keeper, type)):
            functions[id(keeper)] = rewind_of_torch(keeper)
    return list(functions.values())


def items(values: Iterator[Any]) -> Iterator[Any]:
    """Yield the values, and in place of a list or tuple its items."""
    for value in values:
        yield from (value if isinstance(value, (list, tuple)) else [value])


def rewind_of_torch(keeper: Any) -> Callable[[], None]:
    before = copy.deepcopy(keeper.state_dict())
    return lambda: keeper.load_state_dict(copy.deepcopy(before))  # it may keep the tensors that it is given


def rewind_of_mlx(optimizer: Any) -> Callable[[], None]:
    from mlx.utils import tree_flatten

    before = dict(tree_flatten(optimizer.state))
    return lambda: set_leaves(optimizer.state, before)


def set_leaves(state: Any, values: dict[str, Any], path: str = "") -> None:
    """Set the arrays in nested dicts and lists, to which compiled steps refer; those without a value to 0."""
    for key in range(len(state)) if isinstance(state, list) else state:
        at = f"{path}{key}"
        if isinstance(state[key], (dict, list)):
            set_leaves(state[key], values, at + ".")
        else:
            state[key] = values.get(at, state[key] * 0)
