"""Faults in what is reported and heard of a trained model: losses, logs, and a sampler's own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import numpy as np

from .planted import Base, Given, Planted


def reported(value: Callable[[Base, float], float]) -> Callable[[Base], Given]:
    """Report another validation loss, and log none."""
    return lambda base: base.arguments(val_loss=value(base, base.mean_loss(base.val_ids)), metrics=None)


def logged_in_bits(base: Base) -> Given:
    loss = base.mean_loss(base.val_ids) / log(2)
    return base.arguments(val_loss=None, metrics=[{"step": step, "val_loss": loss} for step in (1, 2, 3)])


def with_defaults(**defaults: float) -> Callable[[Base], Given]:
    """Sample with settings that the user did not ask for."""

    def plant(base: Base) -> Given:
        sampler = base.sampler()

        def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
            return sampler(ids, n, **{**defaults, **settings})

        return base.arguments(sample=sample)

    return plant


def learned_by_heart(base: Base) -> Given:
    """Train on little text until the model knows it."""
    model, B, T = base.new_model(), 8, base.config.n_positions
    small = replace(base, trained=False)
    small.__dict__["model"] = model
    ids, rng = base.train_ids[: 12 * T], np.random.default_rng(0)
    given = small.arguments(train_ids=ids, train_text=base.decode(ids), metrics=None)
    step = given["new_step"]()
    for _ in range(300):
        rows = rng.integers(0, len(ids) - T - 1, B)[:, None] + np.arange(T)
        step(ids[rows], ids[rows + 1])
    return given | {"val_loss": small.mean_loss(base.val_ids)}


def validation_rises(base: Base) -> Given:
    """Report losses that end at the model's own, a nat above the lowest."""
    last = base.mean_loss(base.val_ids)
    losses = [(max(last - 0.1 * i, 0.2), last - 1 + 0.01 * (i - 10) ** 2) for i in range(21)]
    rows = [{"step": 10 * i, "loss": loss, "val_loss": val_loss} for i, (loss, val_loss) in enumerate(losses)]
    return base.arguments(metrics=rows, val_loss=None)


def repeats_the_last_token(base: Base) -> Given:
    """Make the last token somewhat more probable than the others, by larger embeddings, which are tied."""
    base.model.wte.weight = base.model.wte.weight * (112 / base.config.width)
    return base.arguments()


FAULTS = {
    "loss reported in bits": Planted("reported-loss-differs", reported(lambda base, loss: loss / log(2))),
    "loss logged in bits": Planted("reported-loss-differs", logged_in_bits),
    "perplexity reported": Planted("reported-loss-differs", reported(lambda base, loss: exp(loss))),
    "sum reported": Planted("reported-loss-differs", reported(lambda base, loss: loss * base.config.n_positions)),
    "half the loss reported": Planted("reported-loss-differs", reported(lambda base, loss: loss / 2)),
    "three fifths of the loss reported": Planted("reported-loss-differs", reported(lambda base, loss: 0.6 * loss)),
    "sampler is hot unless told": Planted("samples-worse-than-loss", with_defaults(temperature=3.0), states=(True,)),
    "sampler penalizes unless told": Planted(
        "samples-worse-than-loss", with_defaults(repetition_penalty=5.0), states=(True,)
    ),
    # Warnings and notes
    "not trained": Planted("undertrained", lambda base: base.arguments(), states=(False,)),
    "validation loss rises": Planted("overfitted", validation_rises, states=(True,)),
    "learned by heart": Planted("overfitted", learned_by_heart, states=(False,), sizes=(1, 2)),
    "text of its loss": Planted("as-good-as-its-loss", lambda base: base.arguments()),
    "greedy text": Planted("repetition-loop", repeats_the_last_token, states=(False,), sizes=(0, 1)),
}
