"""HellaSwag (Zellers et al. 2019): which of four endings does the model find most probable?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_gpt.check.perplexity import Figures
from mlx_gpt.check.scoring import Progress, continuation, mean_and_error, score
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and which of them is right; ``where`` it stands."""

    context: str
    endings: list[str]
    label: int
    where: str


def hellaswag(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], progress: Progress | None = None
) -> Figures:
    """How often the right ending is the most probable: ``acc``, and by the character ``acc_norm``.

    The prompts and both figures are those of lm-evaluation-harness's ``hellaswag``.
    """
    texts = [
        continuation(tokenizer, one.context, f" {ending}", model.config.n_positions, one.where)
        for one in questions
        for ending in one.endings
    ]
    totals = iter([one.log_probs.sum() for one in score(model, texts, progress)])
    right, right_by_character = [], []
    for one in questions:
        log_probs = np.array([next(totals) for _ in one.endings])
        lengths = [len(ending) for ending in one.endings]
        right.append(float(log_probs.argmax() == one.label))
        right_by_character.append(float((log_probs / lengths).argmax() == one.label))
    return {"acc": mean_and_error(right), "acc_norm": mean_and_error(right_by_character)}


def question(activity: str, ctx_a: str, ctx_b: str, endings: Sequence[str], label: int, where: str) -> Question:
    """A line of the set as the harness words it: the activity, a colon, both contexts, all cleaned."""
    context = clean(f"{activity}: {ctx_a} {ctx_b.capitalize()}")
    return Question(context, [clean(ending) for ending in endings], label, where)


def clean(text: str) -> str:
    """Without WikiHow's marks in brackets, such as [header]; [title] begins a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
