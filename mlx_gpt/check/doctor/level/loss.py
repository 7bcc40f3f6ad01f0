"""The model's loss on the validation and training ids, and the losses of n-gram models beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import log

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.data.evidence import SPECIAL, decoded, flat_ids
from mlx_gpt.check.doctor.level.ngrams import NGrams

COUNTED = 4_000_000  # training ids that the n-gram models count; 3 s on two cores
MEASURED = 50_000  # validation ids that they are measured on
ORDERS = ("unigram", "bigram", "trigram")
TOKENS = 16_000  # on which a loss is measured, at most
SHARE = 1 / 40  # of the time that is left, for one loss, or for the samples
FLOATS = 1 << 23  # logits of one call


@dataclass(frozen=True)
class Loss:
    """Losses in nats per token on n windows of T inputs, spread over a text: (n, T), by window and position.

    NaN where a target does not count: after the end of the document with which the window starts.
    """

    losses: np.ndarray
    whole: bool = False  # all windows of the text are measured

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.losses))

    @property
    def error(self) -> float:
        """Return the standard error of the mean, with windows as the independent samples."""
        counts = np.isfinite(self.losses).sum(axis=1)
        if len(counts) < 4:  # of tokens, doubled for their dependence
            return 2 * float(np.nanstd(self.losses)) / max(counts.sum(), 1) ** 0.5
        residuals = np.nansum(self.losses - self.mean, axis=1)
        return float(np.sqrt(np.square(residuals).sum() * len(counts) / (len(counts) - 1)) / counts.sum())

    @property
    def late(self) -> float:
        """Return the mean over the second half of the positions, which have more context."""
        return float(np.nanmean(self.losses[:, self.losses.shape[1] // 2 :]))


def checked_ids(case: Case, name: str, fewest: int = 2) -> np.ndarray:
    """Return ids, or raise ``NotApplicable`` if they are fewer or not all inside the vocabulary."""
    ids = flat_ids(case, name)
    if len(ids) < fewest:
        raise NotApplicable(f"{name} of at least {fewest} tokens")
    if int(ids.min()) < 0 or int(ids.max()) >= case.vocab_size:
        raise NotApplicable(f"{name} inside the vocabulary")
    return ids


def validation_loss(case: Case) -> Loss:
    """Return the lower of the losses on windows that start anywhere and on windows that start at documents."""
    return min((case.once(anywhere), *case.once(at_documents)), key=lambda loss: loss.mean)


def anywhere(case: Case) -> Loss:
    return loss_on(case, checked_ids(case, "val_ids"))


def at_documents(case: Case) -> list[Loss]:
    """Return the loss on windows that start at documents, as those of training may; [] if the starts are unknown."""
    ids, end = checked_ids(case, "val_ids"), case.once(end_of_text)
    is_known = end is not None and (ids[:-1] == end).sum() >= 4
    return [loss_on(case, ids, end=end)] if is_known else []


def training_loss(case: Case) -> Loss:
    """Return the loss on the training ids, on windows that start as those of the validation loss do."""
    documents = case.once(at_documents)
    end = case.once(end_of_text) if documents and case.once(validation_loss) is documents[0] else None
    return loss_on(case, checked_ids(case, "train_ids"), end=end)


def end_of_text(case: Case) -> int | None:
    """Return the id that ends a text: the one given, else the first that ``decode`` writes like ``<|endoftext|>``."""
    if case.has("end_of_text") or not case.has("decode"):
        return case.given.get("end_of_text")
    for i in np.unique(checked_ids(case, "val_ids"))[:5000].tolist():
        if SPECIAL.fullmatch(decoded(case, [i])):
            return int(i)
    return None


def loss_on(
    case: Case,
    ids: np.ndarray,
    name: str = "forward",
    end: int | None = None,
    tokens: int = TOKENS,
) -> Loss:
    """Return the loss on windows spread over a text, as many as time allows; ``name`` is the function to call.

    The windows are as long as the context, or shorter where one would take too long. With ``end``, the id between
    documents, each window starts with it, and targets count up to the next.
    """
    seconds = SHARE * case.seconds_left()
    deadline = time.monotonic() + seconds
    T, rows = window_shape(case, min(case.n_positions, len(ids) - 1))
    every = np.arange((len(ids) - 1) // T) * T if end is None else np.flatnonzero(ids[:-T] == end)
    if not len(every):
        every = np.zeros(1, int)
    starts = every[np.linspace(0, len(every) - 1, min(len(every), max(1, tokens // T))).astype(int)]
    case.rng.shuffle(starts)  # so that those the time allows are spread too
    losses: list[np.ndarray] = []
    for i in range(0, len(starts), rows):
        windows = np.stack([ids[start : start + T + 1] for start in starts[i : i + rows]]).astype(np.int64)
        window_losses = losses_of(case.logits(windows[:, :-1], name), windows[:, 1:])
        if end is not None:
            window_losses[(windows[:, :-1] == end).cumsum(axis=1) > 1] = np.nan
        losses.append(window_losses)
        if time.monotonic() > deadline:
            break
    return Loss(np.concatenate(losses), sum(map(len, losses)) == len(every))


def window_shape(case: Case, T: int) -> tuple[int, int]:
    """Return T, halved until one window takes at most half of the time, and how many windows to read at once."""
    seconds = SHARE * case.seconds_left()
    short = min(T, 64)
    case.logits(case.ids(1, short))  # compiles
    started = time.monotonic()
    case.logits(case.ids(1, short))
    taken = max(time.monotonic() - started, 1e-4)
    while short < T and taken * T / short > seconds / 2:
        T //= 2
    T = max(T, short)
    in_time, in_memory = seconds / 8 / (taken * T / short), FLOATS / (T * case.vocab_size)
    return T, max(1, int(min(in_time, in_memory)))


def losses_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each target, (B, T) float64."""
    highest = logits.max(axis=-1, keepdims=True)
    row_sum = np.exp(logits - highest).sum(axis=-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return np.log(row_sum) + highest[..., 0].astype(np.float64) - chosen


@dataclass(frozen=True)
class Ladder:
    """N-gram models of the training ids, and their losses on the validation ids in nats per token.

    ``losses`` maps "chance" and each of ``ORDERS`` to a loss, none above the one before it. ``kin``: the same for the
    last ids of the training text, by counts of the rest. ``best``: the loss of a perfect model, where it is known.
    """

    models: dict[str, NGrams]
    losses: dict[str, float]
    kin: dict[str, float]
    best: float | None = None

    @property
    def with_best(self) -> dict[str, float]:
        """Return ``losses`` and, where it is known, the best possible one."""
        return self.losses if self.best is None else {**self.losses, "best possible": self.best}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in self.with_best.items())

    def rung(self, loss: float) -> str:
        """Return the name of the lowest rung that a loss reaches, within a hundredth of the distance from chance."""
        slack = 0.01 * (self.losses["chance"] - min(self.losses.values())) + 1e-9
        reached = [name for name, value in self.losses.items() if loss <= value + slack]
        return reached[-1] if reached else "above chance"


def ladder(case: Case) -> Ladder:
    """Return the ladder on ``val_ids``, by counts of ``train_ids``; without them, by counts of half of ``val_ids``."""
    val = checked_ids(case, "val_ids", 64)
    given = case.has("train_ids")
    train = checked_ids(case, "train_ids", 64)[:COUNTED] if given else val[: len(val) // 2]
    val = val[:MEASURED] if given else val[len(val) // 2 :][:MEASURED]
    return replace(ladder_on(train, val, case.vocab_size), best=case.given.get("best_loss"))


def ladder_on(train: np.ndarray, val: np.ndarray, V: int) -> Ladder:
    """Return the ladder for ids in [0, V)."""
    n_kin = min(MEASURED, len(train) // 10)
    counted, kin = train[:-n_kin], train[-n_kin:]
    models = {name: NGrams(counted, V, n) for n, name in enumerate(ORDERS, 1) if V**n < 2**62}
    losses, kin_losses = ({"chance": log(V)} for _ in range(2))
    for name, model in models.items():
        for ids, by_order in ((val, losses), (kin, kin_losses)):
            by_order[name] = min(float(model.losses(ids).mean()), *by_order.values())
    return Ladder(models, losses, kin_losses)
