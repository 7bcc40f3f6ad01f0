"""Planted faults of weights: layers and heads of PlainGPT, and what saving loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .planted import Base, Given, Planted, library

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays, Base], Arrays]


def with_weights(base: Base, change: Change) -> Given:
    """Change the model's own weights."""
    its = library(base.library)
    its.load(base.model, change(parameters_of(base), base))
    return base.arguments(metrics=None)  # they are of the weights before


def parameters_of(base: Base) -> Arrays:
    return library(base.library).functions(base.model)["parameters"]()


def saved_as(base: Base, change: Change) -> Given:
    """Change what is saved: the reloaded model has its initial weights where a parameter is not in the file."""
    its = library(base.library)

    def reload() -> Any:
        model = its.new(base.config, base.faults, base.seed + 1)
        its.load(model, {**its.functions(model)["parameters"](), **change(parameters_of(base), base)})
        return its.functions(model)["forward"]

    return base.arguments(reload=reload)


def equal_heads(values: Arrays, base: Base) -> Arrays:
    """Give all heads the weights of the first, in queries, keys and values."""
    (H, C), changed = (base.config.heads, base.config.width), dict(values)
    for name, array in values.items():
        if array.shape == (3 * C, C):
            first = array.reshape(3, H, C // H, C)[:, :1]
            changed[name] = np.ascontiguousarray(np.broadcast_to(first, (3, H, C // H, C)).reshape(3 * C, C))
    return changed


def units_off(values: Arrays, base: Base) -> Arrays:
    """Set the bias before the activation to −30 in a quarter of the units of one layer."""
    changed = {name: array.copy() for name, array in values.items()}
    for name, array in changed.items():
        if ".0." in name and array.shape == (4 * base.config.width,):
            array[: base.config.width] = -30
    return changed


def all_units_off(values: Arrays, base: Base) -> Arrays:
    """Set the bias before the activation to −30 in all units of all layers."""
    width = 4 * base.config.width
    return {name: array * 0 - 30 if array.shape == (width,) else array for name, array in values.items()}


def zeroed_layer(values: Arrays, base: Base) -> Arrays:
    last = f".{base.config.layers - 1}."
    return {name: array * 0 if last in name and array.ndim == 2 else array for name, array in values.items()}


def without(part: str) -> Change:
    return lambda values, base: {name: array for name, array in values.items() if part not in name}


def squares_transposed(values: Arrays, base: Base) -> Arrays:
    is_square = {name for name, array in values.items() if array.ndim == 2 and len(set(array.shape)) == 1}
    return {name: array.T.copy() if name in is_square else array for name, array in values.items()}


def misnamed(values: Arrays, base: Base) -> Arrays:
    """Save layers counted from 1: the first keeps its initial weights, the others get those of the layer before."""
    shifted = {}
    for name, array in values.items():
        parts = name.split(".")
        if len(parts) > 1 and parts[1].isdigit():
            parts[1] = str(int(parts[1]) + 1)
        if int(parts[1] if len(parts) > 1 and parts[1].isdigit() else 0) < base.config.layers:
            shifted[".".join(parts)] = array
    return shifted


def in_float16(values: Arrays, base: Base) -> Arrays:
    return {name: array.astype(np.float16).astype(np.float32) for name, array in values.items()}


def in_bfloat16(values: Arrays, base: Base) -> Arrays:
    return {
        name: (array.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).astype(np.uint32).view(np.float32)
        for name, array in values.items()
    }


def head_lost(base: Base) -> Given:
    """Save a tied model, load it into one with a head of its own."""
    its, tied = library(base.library), base.with_faults(tied=True)

    def reload() -> Any:
        model = its.new(base.with_faults(tied=False).config, base.faults, base.seed + 1)
        its.load(model, {**its.functions(model)["parameters"](), **parameters_of(tied)})
        return its.functions(model)["forward"]

    return tied.arguments(reload=reload)


def of_model(*faults: str, **config: Any) -> Callable[[Base], Given]:
    return lambda base: base.with_faults(*faults, **config).arguments()


def changing(change: Change) -> Callable[[Base], Given]:
    return lambda base: with_weights(base, change)


def saving(change: Change) -> Callable[[Base], Given]:
    return lambda base: saved_as(base, change)


TRAINED, BOTH = (True,), ("mlx", "torch")
FAULTS = {
    "heads split and merged without a transpose": Planted("heads-mixed-up", of_model("heads-mixed-up"), libraries=BOTH),
    "heads split without a transpose": Planted("heads-mixed-up", of_model("heads-split-wrongly")),
    "values split without a transpose": Planted("heads-mixed-up", of_model("values-split-wrongly")),
    "heads merged without a transpose": Planted("heads-mixed-up", of_model("heads-merged-wrongly")),
    "stream after norm": Planted("residual-after-norm", of_model("residual-after-norm"), libraries=BOTH),
    "stream replaced by the attention": Planted("residual-after-norm", of_model("stream-replaced-by-attention")),
    "stream replaced by the MLP": Planted("residual-after-norm", of_model("stream-replaced-by-mlp")),
    "last block not called": Planted("layer-without-effect", of_model("last-block-not-called")),
    "attention not added": Planted("layer-without-effect", of_model("attention-not-added")),
    "MLP not added": Planted("layer-without-effect", of_model("mlp-not-added")),
    "layer of zeros": Planted("layer-without-effect", changing(zeroed_layer), libraries=BOTH),
    "head is a copy": Planted("head-not-tied", of_model("head-copied", tied=True)),
    "head not saved": Planted("head-not-tied", head_lost, libraries=BOTH),
    "positions not saved": Planted("reload-differs", saving(without("wpe")), libraries=BOTH),
    "biases and norms not saved": Planted("reload-differs", saving(without("ln_")), TRAINED, libraries=BOTH),
    "one matrix not saved": Planted("reload-differs", saving(without("down")), libraries=BOTH),
    "square matrices transposed": Planted("reload-differs", saving(squares_transposed), libraries=BOTH),
    "layers counted from 1": Planted("reload-differs", saving(misnamed), libraries=BOTH),
    "heads drawn once": Planted("identical-heads", changing(equal_heads), libraries=BOTH),
    "units off": Planted("dead-units", changing(units_off), libraries=BOTH),
    "all units off": Planted("dead-units", changing(all_units_off), libraries=BOTH),
    "saved in float16": Planted("precision-loss", saving(in_float16), libraries=BOTH),
    "saved in bfloat16": Planted("precision-loss", saving(in_bfloat16), libraries=BOTH),
}
