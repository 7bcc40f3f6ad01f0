"""Steps whose update is missing, partial, uncorrected, too large or too small, and losses that start too high."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from .optimisation_training import Tree, adam, sgd, trained_with
from .planted import Base, Given, Planted


def only(part: str) -> Callable[[Tree], Tree]:
    """Apply the update to the parameters without ``part`` in their name: the optimizer does not know the others."""
    return lambda grads: {name: grad for name, grad in grads.items() if part not in name}


def copy_trained(base: Base) -> Given:
    """Return a step that computes a loss, and its update on a copy of the parameters."""
    given = trained_with(base)
    return {**given, "new_step": lambda: given["loss"], "step": given["loss"]}


def deep_copy_trained(base: Base) -> Given:
    """Return steps that train another model with the same initial weights."""
    steps = trained_with(replace(base))
    return {**trained_with(base), "new_step": steps["new_step"], "step": steps["step"]}


def blocks_in_a_tuple(base: Base) -> Given:
    base.model.blocks = tuple(base.model.blocks)
    return trained_with(base, reload=None, cached=None)  # which would need the same tuple


UPDATES: dict[str, Planted] = {
    "update not applied": Planted("step-without-effect", copy_trained),
    "another model is trained": Planted("step-without-effect", deep_copy_trained),
    "blocks in a tuple": Planted("parameters-frozen", blocks_in_a_tuple),
    "rate of 0": Planted("step-without-effect", lambda base: trained_with(base, optimizer=adam(0.0))),
    "optimizer without the embeddings": Planted(
        "parameters-frozen", lambda base: trained_with(base, change=only("wte"))
    ),
    "optimizer without the attention": Planted(
        "parameters-frozen", lambda base: trained_with(base, change=only("attention"))
    ),
    "optimizer without the norms": Planted("parameters-frozen", lambda base: trained_with(base, change=only("ln_"))),
    "no bias correction": Planted(
        "no-bias-correction", lambda base: trained_with(base, optimizer=adam(bias_correction=False))
    ),
    "no bias correction, AdamW of 0.9 and 0.99": Planted(
        "no-bias-correction",
        lambda base: trained_with(base, optimizer=adam(bias_correction=False, betas=[0.9, 0.99], weight_decay=0.1)),
    ),
}


def on_another_batch(base: Base) -> Given:
    """Return a step that trains on the same other batch at each call."""
    *_, other = islice(base.batches(8), 5)
    return trained_with(base, batch=lambda x, y: other)


def decay_of(decay: float) -> Callable[[Base], Given]:
    return lambda base: trained_with(base, optimizer=adam(weight_decay=decay), metrics=None)


def rate_of(rate: float, optimizer: Any = adam) -> Callable[[Base], Given]:
    return lambda base: trained_with(base, optimizer=optimizer(rate), learning_rate=rate, metrics=None)


RATES: dict[str, Planted] = {
    "Adam at 1": Planted("learning-rate-too-high", rate_of(1.0)),
    "Adam at 0.3": Planted("learning-rate-too-high", rate_of(0.3)),
    "descent at 30": Planted("learning-rate-too-high", rate_of(30.0, sgd)),
    "Adam at 1e-8": Planted("learning-rate-too-low", rate_of(1e-8)),
    "Adam at 1e-7": Planted("learning-rate-too-low", rate_of(1e-7), states=(False,)),
    "descent at 1e-6": Planted("learning-rate-too-low", rate_of(1e-6, sgd)),
    "ascent": Planted(
        "cannot-memorise-a-batch", lambda base: trained_with(base, change=lambda g: {k: -v for k, v in g.items()})
    ),
    "another batch": Planted("cannot-memorise-a-batch", on_another_batch),
    "decay of 30": Planted("cannot-memorise-a-batch", decay_of(30.0)),
    "decay of 100": Planted("cannot-memorise-a-batch", decay_of(100.0)),
    "decay of 1000": Planted("cannot-memorise-a-batch", decay_of(1000.0)),
}


def large_weights(names: str) -> Callable[[Base], Given]:
    """Draw initial weights with standard deviation 1."""

    def plant(base: Base) -> Given:
        drawn = {
            name: mx.random.normal(value.shape, key=mx.random.key(100 * base.seed + i))
            for i, (name, value) in enumerate(tree_flatten(base.model.parameters()))
            if value.ndim > 1 and names in name
        }
        base.model.update(tree_unflatten(list(drawn.items())))
        return trained_with(base)

    return plant


def first_loss_of(loss: float) -> Callable[[Base], Given]:
    return lambda base: base.arguments(metrics=[{"step": 0, "loss": loss}, {"step": 20, "loss": 3.0}])


def modes_alike(base: Base) -> Given:
    given = trained_with(base)
    return {**given, "forward_training": given["forward"]}


STARTS: dict[str, Planted] = {
    "embeddings of 1": Planted("initial-loss-off", large_weights("wte"), (False,), sizes=(0, 1)),  # tied
    "weights of 1": Planted("initial-loss-off", large_weights(""), states=(False,)),
    "a first loss of 60": Planted("initial-loss-off", first_loss_of(60.0)),
    "modes alike": Planted("training-mode-without-dropout-effect", modes_alike),
}
