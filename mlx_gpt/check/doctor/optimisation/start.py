"""The beginning of training: the loss of the initial weights, and the effect of training mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import train_ids
from mlx_gpt.check.doctor.optimisation.evidence import at_targets, negative_logprobs, probe_rows, untrained
from mlx_gpt.check.doctor.probes import EQUAL, probe_length, silent_if_random, training_noise

ABOVE = 1.75  # nats over ln V
BITS = 1 / np.log(2)
RATES = ("dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate")


@check(
    "initial-loss-off",
    "parameters|train_ids|metrics",
    explains=("learning-rate-too-high", "context-too-short"),  # large weights attend to a single token
)
def initial_loss_off(case: Case) -> Found:
    """Training starts from a loss far above ln V, that of guessing at random: the initial logits are too large.

    Measured is the first loss of the metrics (step 0 or 1), which may be in bits; of an untrained model, one whose norm
    weights are all exactly 1, the cross-entropy of random targets; and without parameters, that of the training ids,
    since no trained model has so high a loss. Threshold: 1.75 nats above ln V. Untrained models of widths 16 to 1024,
    2 and 8 layers, vocabularies of 50 and 2000, tied and not, are above ln V by at most: 0.4 for a standard deviation
    of 0.02, 0.8 for MLX's own initialisation, 0.8 for 1 / sqrt(fan in), 1.2 for Glorot's, 1.5 for He's, 0.3 for
    PyTorch's N(0, 1) embeddings with an untied head. With a tied head the latter are 6.9 to 960 above: the fault.
    """
    chance = float(np.log(case.vocab_size))
    for row in case.given.get("metrics", ())[:1]:
        loss, step = row.get("loss"), row.get("step")
        early = isinstance(step, (int, float)) and step <= 1 and isinstance(loss, (int, float))
        if early and np.isfinite(loss) and loss > BITS * chance + ABOVE:
            return off(float(loss), chance, f"at step {step:g} of the metrics")
    loss = initial_loss(case)
    return None if loss is None or not loss > chance + ABOVE else off(loss, chance, "before training")


def initial_loss(case: Case) -> float | None:
    """Return the loss of an untrained model, and None of others."""
    T, rows = probe_length(case), probe_rows(case, 8)
    if case.has("parameters"):
        if not case.once(untrained):
            return None
        x, y = case.ids(rows, T), case.ids(rows, T)
    elif case.has("train_ids"):
        ids = case.once(train_ids)
        if len(ids) <= rows * T + 1 or ids.min() < 0 or int(ids.max()) >= case.vocab_size:
            raise NotApplicable("train_ids inside the vocabulary")
        x, y = (ids[i : i + rows * T].reshape(rows, T).astype(np.int32) for i in (0, 1))
    else:
        return None
    return float(at_targets(negative_logprobs(case.logits(x)), y, 0)[0].mean())


def off(loss: float, chance: float, where: str) -> Found:
    return {
        "measured": loss,
        "expected": chance,
        "why": f"the loss {where} is {loss:.3g} nats; guessing among all ids has {chance:.3g}",
        "remedy": "draw initial weights, embeddings too, with standard deviation 0.02 (of an output layer onto the "
        "residual stream 0.02 / sqrt(2 L)), and apply a norm before the head",
        "evidence": {"nats_above_chance": loss - chance},
    }


@check("training-mode-without-dropout-effect", "forward", "forward_training")
def training_mode_without_dropout_effect(case: Case) -> Found:
    """Training mode returns exactly the logits of evaluation mode, so dropout has no effect.

    Exact: the logits are equal bit for bit. For a module only if it or its config has a dropout rate above 0.
    """
    rate = dropout_rate(case.given["module"]) if "module" in case.given else None
    if rate == 0:
        return None
    silent_if_random(case)
    ids = case.ids(1, probe_length(case))
    if case.once(training_noise).relative > EQUAL:
        return None
    if not np.array_equal(case.logits(ids), case.logits(ids, "forward_training")):
        return None
    return {
        "measured": 0,
        "expected": "different logits at each call, if dropout is meant to be on",
        "why": "the logits in both modes are equal bit for bit"
        + (f", though the dropout rate is {rate:g}" if rate else "; without dropout that is as it should be"),
        "remedy": "if dropout is wanted, call model.train() before training steps, and pass the mode on to functions",
        "evidence": {"dropout": rate},
    }


def dropout_rate(module: Any) -> float:
    """Return the largest dropout rate of a module's layers and of its config's known names."""
    rates = [0.0]
    for layer in module.modules():
        if "Dropout" in type(layer).__name__:
            rates.append(float(getattr(layer, "p", 1 - getattr(layer, "_p_1", 1))))
    config = getattr(module, "config", None)
    rates += [float(value) for name in RATES if isinstance(value := getattr(config, name, None), (int, float))]
    return max(rates)
