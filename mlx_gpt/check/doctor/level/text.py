"""The text that ``sample`` generates: its probability under the model, its level, and greedy decoding."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.data.evidence import decoded
from mlx_gpt.check.doctor.level.loss import (
    SHARE,
    Ladder,
    checked_ids,
    ladder,
    losses_of,
    validation_loss,
    window_shape,
)
from mlx_gpt.check.doctor.level.samples import NATS, STANDARD_ERRORS, inside, prompts, samples, surprise
from mlx_gpt.check.doctor.level.training import WRONG_TRAINING
from mlx_gpt.check.doctor.sampling.draws import accepted, new_ids


def decoding_gap(case: Case) -> tuple[float, float, float]:
    """Return the loss at one position of windows of validation ids, the loss of the same position if the window ends
    there, as in decoding, and the standard error of the difference. For a causal model they are equal.
    """
    ids = checked_ids(case, "val_ids")
    T = min(case.n_positions, len(ids) - 1, 64)
    if T < 2:
        raise NotApplicable("a context and val_ids of two tokens")
    _, rows = window_shape(case, T)
    starts = case.rng.integers(0, len(ids) - T, min(rows, 32))
    windows = np.stack([ids[start : start + T + 1] for start in starts]).astype(np.int64)
    t = T // 2
    within = losses_of(case.logits(windows[:, :-1])[:, :t], windows[:, 1 : t + 1])[:, -1]
    at_end = losses_of(case.logits(windows[:, :t])[:, -1:], windows[:, t : t + 1])[:, -1]
    difference = at_end - within
    return float(within.mean()), float(at_end.mean()), float(difference.std()) / max(len(starts) - 1, 1) ** 0.5


EXPLAINED_BY = ("state", "causality", "length-dependent", "heads-mixed-up", "vocabulary-mismatch", "cache", "sampling")


@check("samples-worse-than-loss", "sample", explained_by=EXPLAINED_BY)
def samples_worse_than_loss(case: Case) -> Found:
    """The loss is good and the text is not: sampling draws tokens that the model finds improbable.

    Measured is the mean -log p, under the model, of tokens that ``sample`` draws with its default settings. Its
    expectation for draws from the model is the model's mean entropy at the same places; a lower temperature, top-k and
    top-p make it lower. A fault if it is higher by 0.1 nats, 5 % and five standard errors. Also a fault, by the same
    margins: on validation text, a higher loss at the last position of a text, from which generation goes on, than at
    the same position inside a longer text.
    """
    measured = case.once(surprise)
    if measured.too_high:
        return {
            "measured": measured.mean,
            "expected": measured.entropy,
            "why": f"{measured.n} tokens that sample draws with its default settings have a negative log-likelihood of "
            f"{measured.mean:.2f} nats each under the model; draws from its predictions would have "
            f"{measured.entropy:.2f}"
            f"{ruled_out(case)}",
            "remedy": "call sample with every setting off (temperature 1, no top-k, no top-p, no penalty); if its text "
            "is good, lower the default temperature and penalty, else compare its logits with forward's",
            "evidence": {"draws": measured.n, "standard_error": measured.error, **example(case)},
        }
    if not case.has("val_ids"):
        return None
    within, at_end, error = case.once(decoding_gap)
    if at_end - within <= max(NATS, 0.05 * within, STANDARD_ERRORS * error):
        return None
    return {
        "measured": at_end,
        "expected": within,
        "why": f"the loss of validation ids is {within:.2f} inside a text and {at_end:.2f} at its last position, "
        "from which generation goes on",
        "remedy": "look for an effect of later tokens, or of the text's length, on the logits of a position",
        "evidence": example(case),
    }


def ruled_out(case: Case) -> str:
    """Return the end of a sentence on what is not the reason: a higher loss at the end of a text."""
    if not case.has("val_ids"):
        return ""
    within, at_end, error = case.once(decoding_gap)
    if at_end - within > max(NATS, 0.05 * within, STANDARD_ERRORS * error):
        return ""
    return (
        f"; ruled out: that the last position of a text, from which it is continued, predicts worse than one inside "
        f"it ({at_end:.2f} and {within:.2f} on validation text)"
    )


def example(case: Case) -> dict[str, Any]:
    """Return the longest sample and its prompt, decoded where that is possible."""
    longest = max(case.once(samples), key=lambda call: len(call.new))
    return {"prompt": readable(case, longest.text[: longest.n_prompt]), "text": readable(case, longest.new)}


def readable(case: Case, ids: Any) -> Any:
    """Return the text of up to 80 ids, or the ids where ``decode`` is not given or fails for one of them."""
    ids = [int(i) for i in ids[:80]]
    with suppress(CallFailed):  # an untrained model also draws ids that pad the vocabulary
        return decoded(case, ids) if case.has("decode") and inside(case, np.array(ids)) else ids
    return ids


@check(
    "as-good-as-its-loss",
    "sample",
    "val_ids",
    "train_ids",
    explained_by=("causality", "sampling", *WRONG_TRAINING),
)
def as_good_as_its_loss(case: Case) -> Found:
    """The text is as good as the loss allows: sampling is right, and better text needs a lower loss.

    Reported if the samples are neither less probable than the model's predictions (see ``samples-worse-than-loss``) nor
    much more probable, as with a narrow sampler (0.1 nats, 5 % and two standard errors), and no check of sampling
    lacked time. The loss is placed among those of n-gram models (interpolated Kneser-Ney, Chen and Goodman 1999), and
    text of the nearest n-gram model is shown beside the model's.
    """
    measured = case.once(surprise)
    within, at_end, error = case.once(decoding_gap)
    if measured.too_high or at_end - within > max(NATS, 0.05 * within, STANDARD_ERRORS * error):
        return None
    if measured.excess < -max(NATS, 0.05 * measured.entropy, 2 * measured.error):
        raise NotApplicable("a sample whose defaults are temperature 1 without top-k and top-p")
    loss, rungs = case.once(validation_loss).mean, case.once(ladder)
    rung = rungs.rung(loss)
    texts = example(case) | {"ngram_text": ngram_text(case, rungs, rung), "rung": rung}
    better = "as good as" if loss > min(rungs.losses.values()) else "better than"
    return {
        "measured": loss,
        "expected": rungs.with_best,
        "why": f"the validation loss of {loss:.2f} is {better} that of {named(rung)} ({rungs}), which writes "
        f"{quoted(texts['ngram_text'])}; the model writes {quoted(texts['text'])}; the negative "
        f"log-likelihood of its samples is {measured.mean:.2f} nats per token, that of draws from its predictions "
        f"{measured.entropy:.2f}",
        "remedy": "for better text lower the validation loss: more text, more steps, a larger model",
        "evidence": {
            "loss": loss,
            "ladder": rungs.with_best,
            "surprise": measured.mean,
            "entropy": measured.entropy,
            **texts,
        },
    }


def named(rung: str) -> str:
    return {"chance": "random tokens", "above chance": "random tokens"}.get(rung, f"a {rung} model")


def quoted(text: Any) -> str:
    return repr(text[:60]) if isinstance(text, str) else str(text[:12])


def ngram_text(case: Case, rungs: Ladder, rung: str) -> Any:
    """Return text of an n-gram model after the prompt of the example; random ids for chance."""
    if rung not in rungs.models:
        return readable(case, case.ids(1, 80)[0])
    longest = max(case.once(samples), key=lambda call: len(call.new))
    return readable(case, rungs.models[rung].sample(longest.text[: longest.n_prompt], 80, case.rng))


@check("repetition-loop", "sample", "forward", explained_by=("causality", "sampling"))
def repetition_loop(case: Case) -> Found:
    """At temperature 0 the text repeats itself without end, and sampled text does not: greedy decoding, not a fault.

    Reported if the last half or more of a greedy text repeats one sequence at least three times, and at most one sample
    in ten does so (Holtzman et al. 2020, section 4.1).
    """
    greedy = greedy_text(case, case.once(prompts)[0], 96)
    period = loop(greedy)
    loops = [loop(text.new.tolist()) > 0 for text in case.once(samples)]
    if not period or sum(loops) > len(loops) / 10:
        return None
    return {
        "measured": period,
        "expected": 0,
        "why": f"greedy text repeats {quoted(readable(case, greedy[-period:]))} until its end; sampled text does not",
        "remedy": "sample with a temperature and top-p, or a repetition penalty; the model is not damaged",
        "evidence": {"text": readable(case, greedy)},
    }


def greedy_text(case: Case, prompt: list[int], n: int) -> list[int]:
    """Return the most probable continuation, within the context and as long as the time allows."""
    end, text = time.monotonic() + SHARE * case.seconds_left(), list(prompt)
    full = min(len(prompt) + n, case.n_positions)
    while len(text) < full and time.monotonic() < end and (new := greedy_ids(case, text, min(8, full - len(text)))):
        text += new
    return text[len(prompt) :]


def greedy_ids(case: Case, text: list[int], n: int) -> list[int]:
    """Return the next ids by ``sample`` at temperature 0, or one by ``forward`` if it takes no temperature or no 0."""
    if "temperature" in accepted(case):
        with suppress(CallFailed):
            return new_ids(case, text, n, temperature=0)
    return [int(case.logits([text])[0, -1].argmax())]


def loop(ids: list[int]) -> int:
    """Return the shortest period with which the end of the ids, half of them or more, repeats; 0 without one."""
    for period in range(1, len(ids) // 3 + 1 if len(ids) >= 12 else 0):
        end = ids[-max(len(ids) // 2, 3 * period) :]
        if end[period:] == end[:-period]:
            return period
    return 0
