"""Draws of the user's sampler, and the logits that the model gives for the texts it drew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arguments import OFF
from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable
from mlx_gpt.check.doctor.sampling.texts import logits_after

LENGTH = 10  # new ids of a call
SEEDED = (30, 20)  # new ids of a call, and calls, where identical calls give the same text
SHARE = 0.8  # of the time that is left at the first check of sampling, for all of them
PART = 0.2  # of that, for one set of draws


@dataclass(frozen=True)
class Draws:
    """One call of ``sample``: its text, prompt and new ids, and the logits (n, V) that predict each new id.

    ``read``: the texts that the sampler is taken to read before each new id, where they are not the text so far.
    """

    text: np.ndarray
    n_prompt: int
    logits: np.ndarray
    read: Sequence[Sequence[int]] | None = None

    @property
    def new(self) -> np.ndarray:
        return self.text[self.n_prompt :]


def accepted(case: Case) -> set[str]:
    return set(case.given.get("sample_settings") or ())


def settings_off(case: Case, **changed: Any) -> dict[str, Any]:
    """Return the known settings that ``sample`` accepts, off, except those that are changed."""
    return case.once(values_off) | changed


def values_off(case: Case) -> dict[str, float]:
    """Return the values for off, without those for which ``sample`` raises, as nanoGPT's does for top_k = 0."""
    off = {name: value for name, value in OFF.items() if name in accepted(case)}
    if takes(case, off):
        return off
    taken = {name: value for name, value in off.items() if takes(case, {name: value})}
    return taken if takes(case, taken) else off


def takes(case: Case, settings: dict[str, float]) -> bool:
    try:
        call_sample(case, case.ids(1, 1)[0].tolist(), 1, **settings)
    except CallFailed as failure:
        return failure.code != "raises"
    return True


def count(calls: Sequence[Draws]) -> int:
    return sum(len(call.new) for call in calls)


def ids_of(calls: Sequence[Draws]) -> np.ndarray:
    """Return the new ids of all calls, (N,)."""
    return np.concatenate([call.new for call in calls])


def split(rows: np.ndarray, calls: Sequence[Draws]) -> list[np.ndarray]:
    """Split rows (N, ...) into those of each call."""
    return np.split(rows, np.cumsum([len(call.new) for call in calls])[:-1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def chosen(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the log-probability of each id."""
    return logprobs[np.arange(len(ids)), ids]


# Time -------------------------------------------------------------------------------------------------------------


def budget(case: Case) -> tuple[float, float]:
    """Return the time at which the checks of sampling must end, and the seconds for one set of draws."""
    seconds = SHARE * case.seconds_left()
    return time.monotonic() + seconds, PART * seconds


def require_time(case: Case) -> None:
    """Raise ``BudgetSpent`` if the time for the checks of sampling is over."""
    if time.monotonic() > case.once(budget)[0]:
        raise BudgetSpent


# Calls ------------------------------------------------------------------------------------------------------------


def call_sample(case: Case, ids: list[int], n: int, **settings: Any) -> list[int]:
    result = case.call_function("sample", lambda **given: as_numpy(case.given["sample"](ids, n, **given)), **settings)
    if result.ndim == 2 and len(result) == 1:  # a batch of one
        (result,) = result
    if result.ndim != 1 or (result.size and result.dtype.kind not in "iu"):
        raise CallFailed("sample", "wrong-shape", f"sample returned shape {result.shape}; expected ids (n,)")
    return result.tolist()


def returns_the_prompt(case: Case) -> bool:
    """Return True if ``sample`` returns the prompt before the new ids, by the number of ids."""
    prompts = case.ids(2, max(1, min(3, case.n_positions - 1))).tolist()
    return any(len(call_sample(case, list(prompt), 1, **settings_off(case))) > 1 for prompt in prompts)


def changed_prompts(case: Case) -> list[tuple[str, list[int], list[int]]]:
    """Return what ``sample`` changed, the prompt, and the ids that it became; ``new_ids`` appends them."""
    return []


def outside(case: Case) -> list[int]:
    """Return the drawn ids that are not in the vocabulary; ``inside`` appends them."""
    return []


def new_ids(case: Case, prompt: Sequence[int], n: int, **settings: Any) -> list[int]:
    """Return the new ids of one call of ``sample``, without the prompt; record a prompt that was changed."""
    with_prompt = case.once(returns_the_prompt)
    prompt = [int(i) for i in prompt]
    given = list(prompt)
    ids = call_sample(case, given, n, **settings)
    if len(ids) > n + (len(prompt) if with_prompt else 0):
        raise CallFailed("sample", "wrong-shape", f"sample returned {len(ids)} ids for {len(prompt)} and {n} new ones")
    changes = case.once(changed_prompts)
    if given != prompt:
        changes.append(("its argument", prompt, given))
    if with_prompt and ids[: len(prompt)] != prompt:
        changes.append(("the prompt it returned", prompt, ids[: len(prompt)]))
    return ids[len(prompt) :] if with_prompt else ids


def inside(case: Case, ids: list[int]) -> list[int]:
    """Return the ids before the first that is not in the vocabulary, and record that one."""
    for t, i in enumerate(ids):
        if not 0 <= i < case.vocab_size:
            case.once(outside).append(i)
            return ids[:t]
    return ids


def draw_text(case: Case, prompt: Sequence[int], n: int, **settings: Any) -> np.ndarray:
    """Call ``sample`` once, within the context; return prompt and new ids, with an ``end_of_text`` that it left out."""
    n = min(n, case.n_positions - len(prompt))
    drawn = new_ids(case, prompt, n, **settings)
    new = inside(case, drawn)
    if len(drawn) < n:
        end = case.given.get("end_of_text")
        if end is not None and (not drawn or drawn[-1] != end):
            new.append(int(end))  # the sampler drew it and kept it back
    return np.array([*prompt, *new], np.int64)


def draw(case: Case, prompt: Sequence[int], n: int, **settings: Any) -> Draws:
    """Call ``sample`` once, within the context, and compute the logits of its draws."""
    text = draw_text(case, prompt, n, **settings)
    if len(text) == len(prompt):
        return Draws(text, len(prompt), np.zeros((0, case.vocab_size), np.float32))
    return with_logits(case, [text], len(prompt))[0]


def draw_many(
    case: Case, prompts: Sequence[Sequence[int]], total: int, n: int = LENGTH, **settings: Any
) -> list[Draws]:
    """Call ``sample`` with the prompts in turn until there are ``total`` draws or the time is over.

    Where identical calls give the same text, the texts are longer and after many prompts, since the draws of a step may
    depend on each other. Raises ``NotApplicable`` if texts end early though no ``end_of_text`` is given, and
    ``BudgetSpent`` if no time is left.
    """
    require_time(case)
    end = time.monotonic() + case.once(budget)[1]
    texts: list[np.ndarray] = []
    drawn, calls_at_least = 0, 1
    if case.once(is_seeded):
        n, calls_at_least = SEEDED
    for calls, prompt in enumerate(cycle(prompts), start=1):
        text = draw_text(case, prompt, n, **settings)
        full = min(len(prompt) + n, case.n_positions)
        if len(text) < full and "end_of_text" not in case.given and not case.once(outside):
            raise NotApplicable("end_of_text")
        drawn += len(text) - len(prompt)
        texts += [text] if len(text) > len(prompt) else []
        if (calls >= calls_at_least and (drawn >= total or calls >= total)) or time.monotonic() > end:
            break
    if not texts:
        raise NotApplicable("a sampler that returns ids of the vocabulary")
    return with_logits(case, texts, len(prompts[0]))


def with_logits(case: Case, texts: Sequence[np.ndarray], n_prompt: int) -> list[Draws]:
    """Return texts as draws, with the logits that predict each new id."""
    prefixes = [text[:t] for text in texts for t in range(n_prompt, len(text))]
    ends = np.cumsum([len(text) - n_prompt for text in texts])[:-1]
    logits = np.split(logits_after(case, prefixes), ends)
    return [Draws(text, n_prompt, rows) for text, rows in zip(texts, logits, strict=True)]


def is_seeded(case: Case) -> bool:
    """Return True if identical calls give the same text, though its predictions leave a choice."""
    settings = settings_off(case, **({"temperature": 2.0} if "temperature" in accepted(case) else {}))
    same = 0
    for prompt in case.ids(8, max(1, min(6, case.n_positions // 4))).tolist():
        first, second = (draw_text(case, prompt, 16, **settings) for _ in range(2))
        if not np.array_equal(first, second):
            return False
        if len(first) > len(prompt):
            (draws,) = with_logits(case, [first], len(prompt))
            p = np.exp(draws.logits / settings.get("temperature", 1.0) - draws.logits.max())
            same += int((p.max(axis=1) < 0.9 * p.sum(axis=1)).sum())
    return same > 0
