"""The texts that a faulty sampler may read in place of the prompt and the new ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.sampling.crop import tokens_read
from mlx_gpt.check.doctor.sampling.draws import Draws
from mlx_gpt.check.doctor.sampling.texts import logits_after

Window = Callable[[list[int], list[int]], list[int]]  # (prompt, new ids so far) -> the ids that are read
Named = tuple[str, str]  # of what is read: the code of the fault, or "", and a description
TEXT: Named = ("", "")  # the prompt and the new ids, as it should be


def windows(case: Case) -> dict[Named, Window]:
    """Return the texts that may be read, by code and description."""
    last, V = case.vocab_size - 1, case.vocab_size
    reads: dict[Named, Window] = {
        ("prompt-ignored", "the prompt's last token in place of the prompt"): lambda prompt, new: [prompt[-1], *new],
        ("prompt-ignored", "the last token alone"): lambda prompt, new: [*prompt, *new][-1:],
        ("prompt-ignored", "no prompt"): lambda prompt, new: new,
        ("prompt-ignored", "the new tokens alone, id 0 at first"): lambda prompt, new: new or [0],
        ("prompt-ignored", "id 0 in place of the prompt"): lambda prompt, new: [0, *new],
        ("prompt-ignored", "the last id in place of the prompt"): lambda prompt, new: [last, *new],
        ("sampler-not-the-model", "the text without its last token"): lambda prompt, new: [*prompt, *new][:-1],
        ("sampler-not-the-model", "the prompt alone"): lambda prompt, new: prompt,
        ("sampler-not-the-model", "the first token alone"): lambda prompt, new: prompt[:1],
        ("sampler-not-the-model", "the text in reverse"): lambda prompt, new: [*prompt, *new][::-1],
    }
    if (end := case.given.get("end_of_text")) is not None and end < V:
        name = "the end of text"
        reads["prompt-ignored", f"{name} in place of the prompt"] = lambda prompt, new: [end, *new]
        reads["", f"{name} before the text"] = lambda prompt, new: [end, *prompt, *new]
    if (n := case.once(tokens_read) or 1) > 1:
        reads["sampler-not-the-model", f"the last {n} tokens alone"] = lambda prompt, new: [*prompt, *new][-n:]
    return reads


def read_otherwise(case: Case, calls: Sequence[Draws], window: Window) -> list[Draws]:
    """Return draws with the logits after what a window reads; the true logits where it reads nothing."""
    texts = []
    for call in calls:
        prompt, new = call.text[: call.n_prompt].tolist(), call.new.tolist()
        texts += [window(prompt, new[:t])[-case.n_positions :] for t in range(len(new))]
    logits = np.concatenate([call.logits for call in calls])
    reads = [i for i, text in enumerate(texts) if text]
    logits[reads] = logits_after(case, [texts[i] for i in reads])
    ends = np.cumsum([0, *(len(call.new) for call in calls)]).tolist()
    return [
        replace(call, logits=logits[i:j], read=texts[i:j]) for call, i, j in zip(calls, ends, ends[1:], strict=False)
    ]
