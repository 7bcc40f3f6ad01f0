"""HellaSwag (Zellers et al. 2019): choose the right one of four endings by its probability."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.check.scoring import OnScored, continuation, mean_and_error, score
from mlx_gpt.check.task import Evaluation, Task, read_rows, text_field
from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its candidate endings, the index of the right one, and its place (file and line)."""

    context: str
    endings: list[str]
    label: int
    where: str


def hellaswag(model: GPT, tokenizer: Tokenizer, data: Path, on_scored: OnScored | None = None) -> Evaluation:
    """Measure how often the right ending is the most probable (``acc``), and per character (``acc_norm``).

    Prompts and metrics are those of lm-evaluation-harness's ``hellaswag``.
    """
    questions = [parse_question(row, where) for where, row in read_rows(data)]
    texts = [
        continuation(tokenizer, one.context, f" {ending}", model.config.n_positions, one.where)
        for one in questions
        for ending in one.endings
    ]
    totals = iter([one.logprobs.sum() for one in score(model, texts, on_scored)])
    right, right_by_character = [], []
    for one in questions:
        logprobs = np.array([next(totals) for _ in one.endings])
        lengths = [len(ending) for ending in one.endings]
        right.append(float(logprobs.argmax() == one.label))
        right_by_character.append(float((logprobs / lengths).argmax() == one.label))
    metrics = {"acc": mean_and_error(right), "acc_norm": mean_and_error(right_by_character)}
    return Evaluation(metrics, len(questions))


def parse_question(row: dict[str, Any], where: str) -> Question:
    """Build a prompt as lm-evaluation-harness does: the activity, a colon, both contexts, all cleaned."""
    activity, ctx_a, ctx_b = (text_field(row, field, where) for field in ("activity_label", "ctx_a", "ctx_b"))
    endings, label = row.get("endings"), row.get("label")
    if not (isinstance(endings, list) and len(endings) > 1 and all(isinstance(one, str) and one for one in endings)):
        raise DataError(f"{where}: expected a list of texts in the field 'endings', found {endings!r:.40}")
    if str(label) not in map(str, range(len(endings))):
        raise DataError(f"{where}: expected a 'label' from 0 to {len(endings) - 1}, found {label!r}")
    endings = [clean(ending) for ending in endings]
    if not all(endings):
        raise DataError(f"{where}: expected endings with text outside brackets, found an ending without any")
    return Question(clean(f"{activity}: {ctx_a} {ctx_b.capitalize()}"), endings, int(str(label)), where)


def clean(text: str) -> str:
    """Remove WikiHow's tags in brackets, such as [header]; [title] begins a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


TASK = Task("Rowan/hellaswag", "data/validation-00000-of-00001.parquet", hellaswag)
