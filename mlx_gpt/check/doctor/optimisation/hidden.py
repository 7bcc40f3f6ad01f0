"""Parameters that a module uses but does not list, as those of blocks in a Python tuple."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found
from mlx_gpt.check.doctor.inside import arrays_of, module_of, named_modules
from mlx_gpt.check.doctor.modules import is_mlx, is_module
from mlx_gpt.check.doctor.optimisation.evidence import train_batch
from mlx_gpt.check.doctor.optimisation.fresh import fresh_step
from mlx_gpt.check.doctor.probes import between, largest, seeded_logits, steady_noise

DEPTH = 3  # of lists in lists


def of_hidden(case: Case) -> Found:
    """Return the finding if forward uses modules that the module under examination does not list, and no step moves."""
    module = module_of(case)
    hidden = {} if module is None else {name: part for name, part in hidden_modules(module) if is_trainable(part)}
    if not hidden or not has_effect(case, [*hidden.values()]) or moves(case, [*hidden.values()]):
        return None
    names, n = list(hidden), sum(as_numpy(array).size for part in hidden.values() for array in arrays_of(part))
    holder = "a list" if is_mlx(module) else "torch.nn.ModuleList"
    return {
        "measured": names,
        "expected": [],
        "why": f"forward uses {n} parameters that the module's own list of parameters lacks, of {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
        "remedy": f"hold these modules in {holder}, so that optimizer, saving and device know them",
        "evidence": {"modules": names},
        "explains": ("cannot-memorise-a-batch", "reload-differs", "not-deterministic"),  # eval() misses their dropout
    }


def hidden_modules(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and module of those that a module and its parts hold in lists, tuples or dicts and do not list."""
    known = {id(part) for _, part in named_modules(module)}
    for path, part in named_modules(module):
        held = {**vars(part), **(part if is_mlx(part) else {})}
        for name, value in held.items():
            for place, found in modules_in(value, f"{path}.{name}".lstrip("."), DEPTH):
                if id(found) not in known:
                    known.update(id(inner) for _, inner in named_modules(found))
                    yield place, found


def modules_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if is_module(value):
        yield name, value
    elif depth and isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from modules_in(item, f"{name}.{key}", depth - 1)


def is_trainable(part: Any) -> bool:
    """Return True if a module has parameters that are not frozen."""
    if is_mlx(part):
        return bool(part.trainable_parameters())
    return any(parameter.requires_grad for parameter in part.parameters())


def has_effect(case: Case, parts: list[Any]) -> bool:
    """Return True if other values of the parts' parameters change the logits."""
    ids = case.once(train_batch)[0][:1]
    before, again = (seeded_logits(case, ids, "forward", seed=0) for _ in range(2))
    with values_kept(parts):
        for part in parts:
            halve(part)
        after = seeded_logits(case, ids, "forward", seed=0)
    noise = largest(between(again, before))
    return largest(between(after, before)) > max(1e-4 * case.once(steady_noise).scale, 2 * noise)


def moves(case: Case, parts: list[Any]) -> bool:
    """Return True if a step changes the parts' parameters, as with an optimizer that was given them by hand."""

    def arrays() -> list[np.ndarray]:
        return [as_numpy(array) for part in parts for array in arrays_of(part)]

    before = arrays()
    with values_kept(parts), case.parameters_restored():
        step = fresh_step(case)
        for _ in range(3):
            step(*case.once(train_batch))
        return any(not np.array_equal(first, second) for first, second in zip(before, arrays(), strict=True))


def halve(part: Any) -> None:
    if is_mlx(part):
        import mlx.core as mx
        from mlx.utils import tree_map

        part.update(tree_map(lambda a: a * 0.5 if mx.issubdtype(a.dtype, mx.floating) else a, part.parameters()))
        return
    for tensor in part.parameters():
        tensor.data = tensor.data * 0.5


@contextmanager
def values_kept(parts: list[Any]) -> Iterator[None]:
    """Put the parameters of some modules back at the end."""
    if is_mlx(parts[0]):
        kept = [part.parameters() for part in parts]
        try:
            yield
        finally:
            for part, values in zip(parts, kept, strict=True):
                part.update(values)
        return
    tensors = [tensor for part in parts for tensor in part.parameters()]
    data = [tensor.data.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in zip(tensors, data, strict=True):
            tensor.data = values
