"""Planted faults of a forward pass and its cache: contract, state, causality, inputs, cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .plain_cache import FAULTS as CACHE_FAULTS
from .plain_cache import PlainCache
from .planted import Base, Given, Planted

BOTH = ("mlx", "torch")
ALL, SEVERAL = (0, 1, 2), (1, 2)  # sizes; those with several layers
IN_THE_MODEL = {  # PlainGPT's faults
    "no-mask": "future-leak",
    "inverted-mask": "future-leak",
    "mask-shifted": "future-leak",
    "weak-mask": "future-leak",
    "mask-of-minus-1": "future-leak",
    "zero-mask": "future-leak",
    "mask-after-softmax": "future-leak",
    "one-head-unmasked": "future-leak",
    "mean-over-time": "future-leak",
    "softmax-over-queries": "future-leak",
    "no-mask-in-training": "future-leak-in-training",
    "only-itself": "past-ignored",
    "uniform": "past-ignored",
    "attends-over-heads": "heads-mixed-up",
    "attends-over-batch": "batch-leak",
    "softmax-over-batch": "batch-leak",
    "batch-norm": "batch-leak",
    "row-alone": "row-alone-differs",
    "last-row-scaled": "row-alone-differs",
    "returns-probabilities": "probabilities-as-logits",
    "cut": "context-too-short",
    "chunked": "context-too-short",
    "position-blind": "position-blind",
    "one-position": "position-blind",
    "token-blind": "token-blind",
    "positions-from-the-end": "length-dependent",
    "positions-scaled": "length-dependent",
    "scores-over-length": "length-dependent",
}
AFTER_TRAINING = {  # as they come into a model that was sound
    "nan": "non-finite",
    "remembers": "depends-on-earlier-calls",
    "positions-count-on": "depends-on-earlier-calls",
    "noise": "not-deterministic",
}


def in_the_model(*faults: str, **config: Any) -> Callable[[Base], Given]:
    return lambda base: base.with_faults(*faults, **config).arguments()


def after_training(fault: str) -> Callable[[Base], Given]:
    def plant(base: Base) -> Given:
        base.model.faults.add(fault)
        return base.arguments()

    return plant


def with_forward(change: Callable[[Callable[..., Any], np.ndarray], Any]) -> Callable[[Base], Given]:
    """Plant a fault of the function alone that is given as ``forward``."""
    return lambda base: base.arguments(forward=lambda ids: change(base.forward, ids))


def fails(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    raise RuntimeError("expected scalar type Long but found Int")


def fails_when_full(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    return forward(ids) + np.zeros((ids.shape[1], 1))[: 12 if ids.shape[1] > 12 else None]


def empties_its_input(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    logits = forward(ids)
    ids[:] = 0
    return logits


def shifts_its_input(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    logits = forward(ids)
    ids[:, :-1] = ids[:, 1:]
    return logits


def overflows(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    logits = forward(ids)
    logits[..., 5] = np.inf
    return logits


def sleeps(forward: Callable[..., Any], ids: np.ndarray) -> Any:
    time.sleep(30)
    return forward(ids)


def with_cache(fault: str) -> Callable[[Base], Given]:
    def plant(base: Base) -> Given:
        given = base.arguments()
        return {**given, "cached": PlainCache(given["parameters"](), base.config, fault)}

    return plant


FAULTS = {
    **{name: Planted(code, in_the_model(name), libraries=BOTH) for name, code in IN_THE_MODEL.items()},
    **{name: Planted(code, after_training(name), libraries=BOTH) for name, code in AFTER_TRAINING.items()},
    "dropout-left-on": Planted(
        "not-deterministic", in_the_model("dropout-left-on", dropout=0.1), libraries=BOTH
    ),
    "raises": Planted("raises", with_forward(fails)),
    "raises when full": Planted("raises", with_forward(fails_when_full)),
    "last logits only": Planted("wrong-shape", with_forward(lambda forward, ids: forward(ids)[:, -1])),
    "time and vocabulary exchanged": Planted("wrong-shape", with_forward(lambda f, ids: f(ids).swapaxes(1, 2))),
    "rows joined": Planted("wrong-shape", with_forward(lambda forward, ids: forward(ids).reshape(ids.size, -1))),
    "infinite": Planted("non-finite", with_forward(overflows)),
    "empties its input": Planted("changes-input", with_forward(empties_its_input)),
    "shifts its input": Planted("changes-input", with_forward(shifts_its_input)),
    "sleeps": Planted("too-slow", with_forward(sleeps), states=(False,), sizes=(0,)),
    **{
        f"cache: {fault}": Planted("cache-mismatch", with_cache(fault), sizes=SEVERAL if "layers" in fault else ALL)
        for fault in CACHE_FAULTS
    },
}  # fmt: skip
