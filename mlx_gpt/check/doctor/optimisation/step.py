"""The first updates of a fresh optimizer: which parameters they move, and how far."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mlx_gpt.check.doctor.arrays import rms
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.optimisation.evidence import (
    STEP,
    Parameters,
    first_steps,
    given_gradient,
    spacing,
    train_batch,
)
from mlx_gpt.check.doctor.optimisation.fresh import is_fresh
from mlx_gpt.check.doctor.optimisation.hidden import of_hidden
from mlx_gpt.check.doctor.optimisation.updates import begins_as_loaded, updates_of
from mlx_gpt.check.doctor.probes import largest, steady_noise

MOST_TRIED = 24  # parameters whose effect on the logits is tried
# Usual pairs for which an update without bias correction, (1 - b1^k) / sqrt(1 - b2^k), exceeds the learning rate.
BETAS = ((0.9, 0.999), (0.9, 0.99), (0.9, 0.98), (0.95, 0.999), (0.8, 0.999), (0.8, 0.99), (0.85, 0.999), (0.5, 0.999))


@check(
    "step-without-effect",
    *STEP,
    explains=(
        "parameters-frozen",
        "accumulation-differs",
        "no-bias-correction",
        "learning-rate-too-low",
        "cannot-memorise-a-batch",
    ),
)
def step_without_effect(case: Case) -> Found:
    """Training steps change nothing: no parameter moves, or the model that predicts is not the one that is trained.

    Exact: up to 16 steps of a fresh optimizer change no bit of any parameter; or they move parameters by 1e-4 of their
    size and more, and the logits of the batch not at all.
    """
    steps = case.once(first_steps)
    still, before = steps.still(), steps.before
    same_logits = np.array_equal(*steps.logits)
    if not before or (len(still) == len(before) and not same_logits):
        raise NotApplicable("a parameters function that returns the values after a step")
    moved = max(
        (rms(update[name]) / (rms(before[name]) or 1) for update in steps.updates for name in update), default=0
    )
    if len(still) < len(before) and not (same_logits and moved > 1e-4):
        return None
    n = len(steps.updates)
    return {
        "measured": 0,
        "expected": "all parameters move, and the logits with them",
        "why": (
            f"{n} steps leave all {len(before)} parameters as they are"
            if len(still) == len(before)
            else f"{n} steps move the parameters, by {moved:.2g} of their size, but no logit of forward"
        )
        + another_trained(steps.losses),
        "remedy": "pass the model's own parameters to the optimizer, apply its update to them, evaluate that model, "
        "and check that no schedule keeps the learning rate at 0",
        "evidence": {"steps": n, "losses": steps.losses},
    }


def another_trained(losses: list[float]) -> str:
    """Return a remark if the losses of steps on one batch fall all the same."""
    falls = len(losses) > 3 and all(later < earlier for earlier, later in pairwise(losses))
    return f"; yet the losses fall, from {losses[0]:.4g} to {losses[-1]:.4g}: a copy is trained" if falls else ""


def frozen(case: Case) -> list[str]:
    """Return the parameters that no step moves, though they have an effect on the logits and an update would show.

    Those that ``gradient`` leaves out are frozen on purpose; without it, those beside low-rank adapters, and the scales
    of quantized layers.
    """
    steps = case.once(first_steps)
    still = steps.still()
    if len(still) == len(steps.before):
        return []
    sizes = [largest(steps.updates[-1][name]) for name in steps.before if name not in still]
    usual = float(np.median(sizes))
    if case.has("gradient"):
        grads = case.once(given_gradient)
        still = [name for name in still if name in grads]
        pairs = [(largest(steps.updates[-1][name]), largest(grads[name])) for name in steps.before if name in grads]
        rate = float(np.median([update / grad for update, grad in pairs if update > 0 and grad > 0] or [0]))
        expected = {name: min(usual, rate * largest(grads[name])) if grads[name].any() else usual for name in still}
    else:
        adapters = any("lora" in name.lower() for name in steps.before)
        still = [name for name in still if not adapters and not name.endswith((".scales", ".zeros"))]
        expected = dict.fromkeys(still, usual)
    still = [name for name in still if expected[name] > 4 * spacing(steps.before[name])]
    return with_effect(case, steps.before, still)


def with_effect(case: Case, before: Parameters, names: list[str]) -> list[str]:
    """Return those parameters whose change by a tenth moves the logits, by 1e-4 of their standard deviation."""
    if not names:
        return []
    ids = case.once(train_batch)[0][:1]
    scale = case.once(steady_noise).scale
    kept = []
    with case.parameters_restored():
        logits = case.logits(ids)
        for name in names[:MOST_TRIED]:
            size = 0.1 * (rms(before[name]) or 0.1)
            case.load({**before, name: before[name] + size * case.rng.standard_normal(before[name].shape, np.float32)})
            if largest(case.logits(ids) - logits) > 1e-4 * scale:
                kept.append(name)
    return kept


@check("parameters-frozen", *STEP, explains=("cannot-memorise-a-batch",))
def parameters_frozen(case: Case) -> Found:
    """Some parameters never move in training, though they have an effect on the predictions.

    Exact: three steps of a fresh optimizer do not change one bit of a parameter, although it has an effect on the
    logits and its expected update, by its gradient or by the updates of others, is above 4 units in the last place.
    Parameters that ``gradient`` leaves out are frozen on purpose. Single rows, as of tokens that do not occur, are not
    examined. Also parameters that forward uses and the module does not list, as those of blocks in a tuple.
    """
    if finding := of_hidden(case):
        return finding
    steps, names = case.once(first_steps), case.once(frozen)
    if not names:
        return None
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    zero = [name for name in names if case.has("gradient") and not case.once(given_gradient)[name].any()]
    remedy = "pass all parameters to the optimizer, and apply its update to all"
    if len(zero) == len(names):
        remedy = "their gradient is exactly 0: remove the stop_gradient, detach or no_grad between them and the loss"
    return {
        "measured": names,
        "expected": [],
        "why": f"{len(names)} of {len(steps.before)} parameters do not move in {len(steps.updates)} steps: {shown}",
        "remedy": remedy,
        "evidence": {"gradient_is_zero": zero},
    }


@check("no-bias-correction", *STEP, "learning_rate", explains=("learning-rate-too-high",))
def no_bias_correction(case: Case) -> Found:
    """The first updates are several times the learning rate, as Adam's averages start at 0 without bias correction.

    While the gradient stays the same, Adam's k-th update in units of the learning rate is 1 with bias correction, and
    (1 − b1^k) / sqrt(1 − b2^k) without: 3.16 for the first with 0.9 and 0.999 (Kingma and Ba 2015, section 3). Examined
    are parameters of which the upper half of the first updates has one size within 5 %, as only Adam, Lion and the sign
    of the gradient give. A fault if their median is within 3 % of such a value for usual betas, and that is above 1.2
    or the second update is larger by 12 % (healthy: the first is 1.00, the second not larger).
    """
    steps, rate = case.once(first_steps), float(case.given["learning_rate"])
    updates, sequences = steps.updates, []
    if is_fresh(case):
        if not case.once(begins_as_loaded):
            raise NotApplicable("a step that begins at the loaded parameters")
        updates = list(updates_of(case, *[case.once(train_batch)] * 3))
    for name, first in updates[0].items():
        size = np.abs(first).ravel()
        top = size >= np.median(size[size > 0]) if size.any() else size > 0
        middle = float(np.median(size[top])) if top.any() else 0.0
        if middle <= 50 * spacing(steps.before[name]) or np.quantile(size[top], 0.95) > 1.05 * middle:
            continue
        sequences.append([float(np.median(np.abs(u[name]).ravel()[top])) / rate for u in updates[:3]])
    if rate <= 0 or len(sequences) < max(1, len(steps.before) / 4):
        return None
    measured = np.median(sequences, axis=0)
    k = np.arange(1, len(measured) + 1)
    for b1, b2 in BETAS:
        expected = (1 - b1**k) / np.sqrt(1 - b2**k)
        if abs(measured[0] / expected[0] - 1) > 0.03 or expected.max() < 1.2:
            continue
        grows = len(measured) > 1 and measured[1] > 1.12 * measured[0]
        if grows or expected[0] > 1.2:
            return {
                "measured": float(measured[0]),
                "expected": 1.0,
                "why": f"the first update is {measured[0]:.3g} learning rates long, the next {measured[1]:.3g}: as of "
                f"Adam with betas {b1} and {b2} without bias correction",
                "remedy": "divide m by 1 - b1^t and v by 1 - b2^t: mlx.optimizers.AdamW(..., bias_correction=True)",
                "evidence": {"updates_over_learning_rate": measured.tolist(), "parameters": len(sequences)},
            }
    return None
