"""Faults of loss, gradient and step to plant in a small GPT, and healthy ways to train that must have no fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from . import optimisation_accumulation, optimisation_gradients, optimisation_losses, optimisation_steps
from .optimisation_accumulation import accumulated, over_calls
from .optimisation_losses import ignoring, masked, padded_batches, with_z_loss
from .optimisation_training import RATE, Tree, adam, cross_entropy, sgd, step_alone, trained_with
from .planted import Base, Given, Planted

FAULTS: dict[str, Planted] = {
    **optimisation_losses.FAULTS,
    **optimisation_steps.UPDATES,
    **optimisation_accumulation.FAULTS,
    **optimisation_steps.RATES,
    **optimisation_steps.STARTS,
    **optimisation_gradients.FAULTS,
}


def muon() -> Any:
    return optim.MultiOptimizer([optim.Muon(0.01), adam()()], [lambda name, p: p.ndim == 2 and "blocks" in name])


def clipped(grads: Tree) -> Tree:
    return optim.clip_grad_norm(grads, 0.1)[0]


def embeddings_frozen(base: Base) -> Given:
    """Return a model whose embeddings are frozen on purpose, so that gradient leaves them out."""
    base.model.wte.freeze()
    return trained_with(base)


def warmup(base: Base) -> Given:
    return trained_with(base, optimizer=adam(optim.linear_schedule(0, RATE, 50)))


HEALTHY: dict[str, Callable[[Base], Given]] = {
    "plain": lambda base: trained_with(base),
    "z-loss": lambda base: trained_with(base, with_z_loss),
    "1.5 times": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) * 1.5),
    "perplexity": lambda base: (
        trained_with(base, loss=cross_entropy)
        | {"loss": lambda x, y: mx.exp(cross_entropy(base.model(mx.array(x)), mx.array(y))).item()}
    ),
    "masked": lambda base: trained_with(base, masked, batches=padded_batches(base)),
    "a quarter": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) / 4),
    "ignores an id that pads": lambda base: trained_with(
        base.with_faults(vocab_size=len(base.vocabulary) + 1),
        ignoring(len(base.vocabulary)),
        decode=lambda ids: base.decode([i for i in ids if i < len(base.vocabulary)]),
    ),
    "without the last": lambda base: trained_with(base, lambda l, y: cross_entropy(l[:, :-1], y[:, :-1])),
    "shifts itself": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l[:, :-1], y[:, 1:]), batches=lambda: ((x, x) for x, _ in base.batches())
    ),
    "in bfloat16": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l.astype(mx.bfloat16), y).astype(mx.float32)
    ),
    "gradient descent": lambda base: trained_with(base, optimizer=sgd(0.1), learning_rate=0.1),
    "gradient descent, momentum": lambda base: trained_with(
        base, optimizer=sgd(0.1, momentum=0.9, nesterov=True), learning_rate=0.1
    ),
    "Adam": lambda base: trained_with(base, optimizer=lambda: optim.Adam(RATE, bias_correction=True)),
    "AdamW, decay": lambda base: trained_with(base, optimizer=adam(weight_decay=0.1)),
    "Adam, 0.9 and 0.95, uncorrected": lambda base: trained_with(
        base, optimizer=adam(betas=[0.9, 0.95], bias_correction=False)
    ),
    "Lion": lambda base: trained_with(base, optimizer=lambda: optim.Lion(3e-4), learning_rate=3e-4),
    "Muon": lambda base: trained_with(base, optimizer=muon, learning_rate=0.01),
    "Adafactor": lambda base: trained_with(base, optimizer=lambda: optim.Adafactor()),
    "clipped": lambda base: trained_with(base, change=clipped),
    "clipped descent": lambda base: trained_with(base, optimizer=sgd(0.1), change=clipped, learning_rate=0.1),
    "warmup": warmup,
    "accumulated": lambda base: trained_with(base, gradients=accumulated(4, 0.25)),
    "descent, accumulated": lambda base: trained_with(
        base, optimizer=sgd(0.1), gradients=accumulated(4, 0.25), learning_rate=0.1
    ),
    "small rate": lambda base: trained_with(base, optimizer=adam(1e-4), learning_rate=1e-4),
    "large rate": lambda base: trained_with(base, optimizer=adam(1e-2), learning_rate=1e-2),
    "step alone": lambda base: step_alone(trained_with(base)),
    "step alone, accumulated over calls": lambda base: step_alone(over_calls(base, clear=False)),
    "accumulated over calls": lambda base: over_calls(base, clear=False),
    "embeddings frozen": embeddings_frozen,
}
