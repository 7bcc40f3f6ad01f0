"""Compare the reported validation loss with the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, log

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import batches, decoded
from mlx_gpt.check.doctor.level.loss import (
    Loss,
    anywhere,
    at_documents,
    checked_ids,
    loss_on,
    training_loss,
    validation_loss,
)
from mlx_gpt.check.doctor.level.metrics import curve, metrics

EXPLAINED_BY = (
    "state",
    "batch-leak",
    "row-alone-differs",
    "future-leak",
    "length-dependent",
    "reload-differs",
    "vocabulary-mismatch",
    "ids-wrapped",
    "targets-not-shifted",
    "targets-shifted-twice",
    "loss-not-cross-entropy",
    "loss-not-the-mean",
)


@check("reported-loss-differs", "val_ids", "val_loss|metrics", explained_by=EXPLAINED_BY)
def reported_loss_differs(case: Case) -> Found:
    """The validation loss that was reported is not the model's: another unit, a sum, another text, or other weights.

    The model's loss is measured in nats per token on windows of ``val_ids`` that start anywhere and that start at
    documents. A reported loss may lie between these, and may be as low as the mean over the second half of the
    positions, since other windows may give more context. A fault if it lies outside by more than six standard errors
    (two if the whole text was measured, since the report may be of a part of it), 0.05 nats, 2 %, and for a log the
    difference of its last two values; by more than 10 % if none of the known causes gives the reported value.
    """
    loss = case.once(validation_loss)
    differences = [differs(case, loss, *report) for report in reported(case)]
    if not differences:
        raise NotApplicable("val_loss, or metrics with a val_loss")
    return next(filter(None, differences), None)


def differs(case: Case, loss: Loss, values: list[float], change: float) -> Found:
    margin = (2 if loss.whole else 6) * loss.error + 0.05 + 0.02 * loss.mean + change
    plain, means = case.once(anywhere), [at_document.mean for at_document in case.once(at_documents)]
    low, high = min([plain.late, plain.mean, *means]) - margin, max([plain.mean, *means]) + margin
    if any(low <= value <= high for value in values):
        return None
    value = values[0]
    fits = {cause: abs(value / other - 1) for cause, other in causes(case, loss) if other > 0}
    cause = min(fits, key=lambda cause: fits[cause], default="")
    if not cause or fits[cause] > min(margin / loss.mean, 0.1):
        cause = ""
        if abs(value - loss.mean) <= 0.1 * loss.mean:
            return None
    unknown = "; it is not the loss in bits, a sum, of the training text or in training mode: other weights or text?"
    return {
        "measured": loss.mean,
        "expected": value,
        "why": f"the model's loss on val_ids is {loss.mean:.3f} nats per token (standard error {loss.error:.3f}), and "
        f"{value:.3f} was reported" + (f", which is {cause}" if cause else unknown),
        "remedy": "evaluate with the mean cross-entropy in nats, over tokens of the validation text, in evaluation "
        "mode, and with the weights that are used",
        "evidence": {"ratio": loss.mean / value if value else None, "cause": cause, "second_half": loss.late},
    }


def reported(case: Case) -> Iterator[tuple[list[float], float]]:
    """Yield for each report the losses of which one must be the model's, and the change between the last two."""
    if case.has("val_loss"):
        yield [float(case.given["val_loss"])], 0.0
    _, values = curve(case.once(metrics), "val_loss")
    if len(values):
        yield [float(values[-1]), float(values.min())], abs(float(values[-1] - values[-2:][0]))


def causes(case: Case, loss: Loss) -> Iterator[tuple[str, float]]:
    """Yield descriptions and values of what may have been reported in place of the validation loss."""
    mean, T = loss.mean, loss.losses.shape[1]
    yield "the loss in bits: divided by ln 2", mean / log(2)
    yield "the loss multiplied by ln 2", mean * log(2)
    yield "the perplexity: exp of the loss", exp(min(mean, 700))
    yield "the sum over a window", mean * T
    yield "the mean divided by the length of a window", mean / T
    if case.has("batches"):
        x, _ = case.once(batches)[0]
        yield "the sum over a batch", mean * x.size
        yield "the sum over the rows of a batch", mean * len(x)
        yield "the mean divided by the number of rows", mean / len(x)
    if case.has("train_ids"):
        yield "the loss on train_ids", case.once(training_loss).mean
    if case.has("forward_training"):
        ids = checked_ids(case, "val_ids")
        yield "the loss in training mode, with dropout", loss_on(case, ids, "forward_training", tokens=8_000).mean
    if case.has("decode"):
        ids = checked_ids(case, "val_ids")[:2000]
        per_character = len(ids) / max(len(decoded(case, ids)), 1)
        yield "in bits per character", mean / log(2) * per_character
        yield "in nats per character", mean * per_character
