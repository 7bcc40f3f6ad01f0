"""Texts that become longer than the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.sampling.draws import (
    Draws,
    accepted,
    changed_prompts,
    chosen,
    inside,
    new_ids,
    outside,
    require_time,
    returns_the_prompt,
    settings_off,
)
from mlx_gpt.check.doctor.sampling.explain import DECIDED, LEAST
from mlx_gpt.check.doctor.sampling.fit import SURE
from mlx_gpt.check.doctor.sampling.probes import sharp_temperature
from mlx_gpt.check.doctor.sampling.rules import Rule
from mlx_gpt.check.doctor.sampling.texts import logits_after
from mlx_gpt.check.doctor.sampling.verdict import undecided, understood

ROUNDS = (1, 3, 7, 15, 30, 60, 120, 240, 480)  # texts after which the evidence is weighed, at least
HALF_WAY = 60  # of them, after which it must be a little decided
NUMBERS = 2e7  # logits of a round, at most
NEW = 10  # new ids of a text
FIRST = 2  # of them that are not beyond the context yet
WINDOWS = 1000  # that a text may be read in, about
LONGEST = 256  # context for which the predictions after so many windows are affordable


@check("beyond-context", "sample")
def beyond_context(case: Case) -> dict[str, Any] | None:
    """The text goes wrong, or generation raises an error, once the text is longer than the context.

    Healthy samplers stop, refuse, or read a window of the last tokens, of at least a quarter of the context; those that
    return the prompt return all of it. A fault if the draws are e^20 times as probable after another text, or by
    chance, as after any such window.
    """
    found = understood(case)
    if found.window is not None:
        raise NotApplicable("a sampler that reads its text")
    assert found.base is not None
    case.once(returns_the_prompt)
    P = case.n_positions
    temperature = case.once(sharp_temperature)
    settings = settings_off(case, **({"temperature": temperature} if "temperature" in accepted(case) else {}))
    rule, score, n, right, wrong = found.base.rule(temperature), Counter[str](), 0, 0.0, 0.0
    texts: list[list[int]] = []
    most = NUMBERS / (WINDOWS * case.vocab_size)
    for text in range(1, ROUNDS[-1] + 1):
        require_time(case)
        prompt = case.ids(1, max(1, P - 1))[0].tolist()
        changes = len(case.once(changed_prompts))
        try:
            drawn = new_ids(case, prompt, NEW if P <= LONGEST else FIRST + 1, **settings)
        except CallFailed as failure:
            if refuses(failure):
                raise NotApplicable("a sampler that continues a text beyond n_positions") from None
            return beyond(f"a text of more than {P} tokens ends with {failure.message}", "an error")
        if len(case.once(changed_prompts)) > changes == 0:
            return beyond(f"a text of more than {P} tokens is returned without its first ones", "another text")
        if found.correlated:
            raise NotApplicable("a sampler whose draws are independent")
        if P > LONGEST:
            raise NotApplicable(f"n_positions of at most {LONGEST}")
        knew = bool(case.once(outside))
        new = inside(case, drawn)
        if len(new) < len(drawn) and not knew:
            return beyond(f"id {drawn[len(new)]} is drawn after more than {P} tokens", drawn[len(new)])
        if len(new) > FIRST:
            texts.append([*prompt, *new])
        if not texts or (len(texts) < most and text not in ROUNDS):
            continue
        score.update(scores(case, texts, len(prompt), rule))
        n += sum(map(len, texts)) - len(texts) * (len(prompt) + FIRST)
        texts = []
        right, wrong = (max(score[name] for name in score if name.startswith(kind)) for kind in ("last", "not"))
        if wrong - right > SURE:
            return beyond(
                f"{n} ids drawn after more than {P} tokens are predicted by no window of the last tokens", wrong - right
            )
        if right - wrong > SURE:
            return None
        if text >= HALF_WAY and abs(right - wrong) < DECIDED / 4:  # far from decided by more texts
            break
    if n and right - wrong < DECIDED:
        raise undecided(case)
    return None


def scores(case: Case, texts: Sequence[list[int]], n_prompt: int, rule: Rule) -> Counter[str]:
    """Return the log-likelihood of the draws beyond the context for each window that may be read, and by chance.

    Windows whose name begins with "last" are allowed: the last tokens, by a fixed length or start. Those with "not" are
    faults: few tokens, the first tokens of the text, and "not at all", a mixture of all windows and uniform draws.
    """
    named = [windows_beyond(text, n_prompt, case.n_positions) for text in texts]
    logits = logits_after(case, [window for names in named for every in names.values() for window in every])
    score, start = Counter[str](), 0
    for text, names in zip(texts, named, strict=True):
        new = np.tile(text[n_prompt + FIRST :], len(names))
        draws = Draws(np.array(text), n_prompt, logits[start : start + len(new)])
        start += len(new)
        p = np.exp(np.maximum(chosen(rule([draws]), new), LEAST)).reshape(len(names), -1)
        score.update(dict(zip(names, np.log(p).sum(axis=1).tolist(), strict=True)))
        score.update({"not at all": np.log(0.5 / case.vocab_size + 0.5 * p.mean(axis=0)).sum().item()})
    return score


def windows_beyond(text: list[int], n_prompt: int, P: int) -> dict[str, list[list[int]]]:
    """Return, by name, the texts that may be read before each new id beyond the context."""
    ends, least, step = range(n_prompt + FIRST, len(text)), max(2, P // 4), max(1, P * P // 4000)
    lengths = {1, 2, least, P // 2, P - 1, P, *range(1, P + 1, step)} - {0}
    names = {f"last {m}": [text[e - m : e] for e in ends] for m in lengths if m >= least or P < 4}
    starts = {ends[0] - m for m in lengths if m >= least and ends[-1] - ends[0] + m <= P}
    names |= {f"last from {s}": [text[s:e] for e in ends] for s in starts}
    names |= {f"not {m}": [text[e - m : e] for e in ends] for m in lengths if m < least and P >= 4}
    names |= {f"not from {s}": [text[s:e][-P:] for e in ends] for s in (P - 1, P) if P >= 4 and ends[0] - s < least}
    return names | {"not the first": [text[:P]] * len(ends)}


def refuses(failure: CallFailed) -> bool:
    """Return True for an error that refuses a long text on purpose, or one of transformers, which warns before."""
    cause = failure.__cause__
    trace = cause.__traceback__ if cause is not None else None
    while trace is not None:
        if "transformers/generation/" in trace.tb_frame.f_code.co_filename.replace("\\", "/"):
            return True
        trace = trace.tb_next
    own = ("ValueError", "AssertionError", "UsageError", "MLXGPTError")
    return failure.code != "raises" or (type(cause).__name__ in own and not str(cause).startswith("["))


def beyond(why: str, measured: Any) -> dict[str, Any]:
    return {
        "measured": measured,
        "expected": "a text that stops, or goes on from a window of the last tokens",
        "why": why,
        "remedy": "read only the last n_positions tokens, text[-n_positions:], or stop where the context is full",
        "evidence": {},
    }
