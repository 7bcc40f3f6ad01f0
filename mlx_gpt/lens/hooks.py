"""Edits of activations and the store of those that were asked for, at the places that ``trace`` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.lens.names import ActivationNames, is_attention_map

Edit = Callable[[mx.array, str], mx.array]  # (activation, its name) -> an activation of the same shape


class Activations(dict[str, mx.array]):
    """Arrays by the names they were asked for by; an alias of a name finds its array too."""

    def __init__(self, names: ActivationNames):
        super().__init__()
        self._names = names

    def __missing__(self, name: str) -> mx.array:
        wanted = list(self._names.find(name).values())  # UsageError for an unknown name
        for key in self:
            if [self._names.aliases.get(key, key)] == wanted:
                return self[key]
        raise UsageError(f"the activation {name!r} was not stored; name it in the names of the trace")

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None

    def get(self, name: Any, default: Any = None) -> Any:
        try:
            return self[name]
        except UsageError:
            return default


class Hooks:
    """A function (name, activation) -> activation that edits, then stores a copy of what the model goes on with.

    ``edits`` are pairs of a name or pattern and a function, applied in their order. Each gets its own copy, so that
    a change in place reaches no other activation. ``names`` are names or patterns; None stores the default ones.
    """

    def __init__(self, config: GPTConfig, edits: Iterable[tuple[str, Edit]], names: str | Sequence[str] | None):
        self.names = ActivationNames(config)
        self.edits: dict[str, list[tuple[str, Edit]]] = {}
        for pattern, edit in edits:
            if not callable(edit):
                raise UsageError(
                    f"the edit of {pattern} must be a function of an activation and its name, not {edit!r}"
                )
            for asked, name in self.names.find(pattern).items():
                self.edits.setdefault(name, []).append((asked, edit))
        self.stored_as: dict[str, list[str]] = {}
        patterns = [names] if isinstance(names, str) else self.names.stored if names is None else names
        for asked, name in {
            key: name for pattern in patterns for key, name in self.names.find(pattern).items()
        }.items():
            self.stored_as.setdefault(name, []).append(asked)
        self.activations = Activations(self.names)
        self._faults: list[tuple[str, mx.array]] = []  # name of an edited activation, whether it is unusable

    def wants(self, name: str) -> bool:
        """Return whether an activation is to be stored or edited."""
        return name in self.stored_as or name in self.edits

    def __call__(self, name: str, x: mx.array) -> mx.array:
        """Return x after the edits of this name."""
        x = self.edit(name, x)
        for key in self.stored_as.get(name, ()):
            self.activations[key] = copy_of(x)
        return x

    def edit(self, name: str, x: mx.array) -> mx.array:
        """Apply the edits of this name. ``UsageError`` for an edit that returns no array of the same shape."""
        for asked, edit in self.edits.get(name, ()):
            edited = edit(copy_of(x), asked)
            if not isinstance(edited, (mx.array, np.ndarray)):
                raise UsageError(f"the edit of {asked} must return an array, not {type(edited).__name__}")
            if tuple(edited.shape) != x.shape:
                raise UsageError(f"the edit of {asked} must return the shape {x.shape}, not {tuple(edited.shape)}")
            x = mx.array(edited).astype(x.dtype)
            self._faults.append((asked, is_unusable(asked, x)))
        return x

    def check(self) -> None:
        """Raise ``UsageError`` if an edit returned NaN. Computes what leads to the edits, except while compiling."""
        faults, self._faults = self._faults, []
        try:
            mx.eval([fault for _, fault in faults])
        except ValueError:  # mx.compile and mx.vmap have no values yet
            return
        for name, fault in faults:
            if fault.item():
                reason = "NaN, or masks all keys of a query" if is_attention_map(name) else "NaN"
                raise UsageError(f"the edit of {name} returns {reason}; its result must be numbers")


def is_unusable(name: str, x: mx.array) -> mx.array:
    """Return whether an edited activation would make the rest NaN, as a boolean array without axes."""
    if name.endswith("hook_attn_scores"):  # a softmax over -inf only is NaN
        return mx.isnan(x).any() | (x.max(axis=-1) == -mx.inf).any()
    return mx.isnan(x).any()


def copy_of(x: mx.array) -> mx.array:
    """Return an array that can be assigned to without changing x; no data is copied before that."""
    return x[...]
