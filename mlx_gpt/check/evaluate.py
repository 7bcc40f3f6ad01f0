"""One evaluation with all that it depends on: ``perplexity``, ``lambada`` or ``hellaswag``."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_gpt.check.datasets import read_passages, read_questions, read_text
from mlx_gpt.check.hellaswag import hellaswag
from mlx_gpt.check.lambada import lambada
from mlx_gpt.check.perplexity import Figures, perplexity
from mlx_gpt.check.published import tables
from mlx_gpt.check.scoring import Progress
from mlx_gpt.errors import UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TASKS = ("perplexity", "lambada", "hellaswag")
PUBLISHED = Path(__file__).with_name("evaluations.json")


def evaluate(
    model: GPT, tokenizer: Tokenizer, task: str, data: Path, stride: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The figures of a task on a file, with standard errors and every setting: what ``mlx-gpt eval --json`` prints.

    ``stride`` is perplexity's, half the model's context if not given. Raises ``UsageError`` or ``DataError``.
    """
    settings: dict[str, Any] = {"n_positions": model.config.n_positions, "dtype": str(model.wte.weight.dtype)}
    if task not in TASKS:
        raise UsageError(f"--task must be one of {', '.join(TASKS)}, not {task!r}")
    if stride is not None and task != "perplexity":
        raise UsageError(f"--stride is a setting of perplexity, not of {task}; leave it out")
    figures: Figures
    if task == "perplexity":
        settings["stride"] = max(1, model.config.n_positions // 2) if stride is None else stride
        figures, n = perplexity(model, tokenizer, read_text(data), settings["stride"], progress)
    elif task == "lambada":
        passages = read_passages(data)
        figures, n = lambada(model, tokenizer, passages, progress), len(passages)
    else:
        questions = read_questions(data)
        figures, n = hellaswag(model, tokenizer, questions, progress), len(questions)
    return {
        "task": task,
        "figures": {name: {"value": value, "stderr": error} for name, (value, error) in figures.items()},
        "n": n,
        "data_sha256": sha256_of(data),
        "tokenizer_sha256": tokenizer.hash,
        "settings": settings,
        "mlx": version("mlx"),
    }


def published(task: str, name: str, folder: Path, n_parameters: int) -> list[dict[str, Any]]:
    """What others measured of this model, known by its id or by the bytes of its weights; empty for any other."""
    for known, table in tables().items():
        digests = table["sha256"]
        if table["parameters"] != n_parameters:
            continue
        if name in table["ids"] or (digests and _digests(folder, digests) == digests):
            return json.loads(PUBLISHED.read_text(encoding="utf-8")).get(known, {}).get(task, [])
    return []


def _digests(folder: Path, names: dict[str, str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}
