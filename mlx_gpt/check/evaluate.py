"""Run one of the evaluations in ``TASKS`` and report its metrics with everything they depend on."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_gpt.check import hellaswag, lambada, perplexity
from mlx_gpt.check.published import find_known, hash_files, known_models
from mlx_gpt.check.scoring import OnScored
from mlx_gpt.check.task import Task
from mlx_gpt.errors import UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TASKS = {"perplexity": perplexity.TASK, "lambada": lambada.TASK, "hellaswag": hellaswag.TASK}
PUBLISHED = Path(__file__).with_name("evaluations.json")


def find_task(name: str) -> Task:
    """Return a task by name. Raises ``UsageError``."""
    if name not in TASKS:
        raise UsageError(f"--task must be one of {', '.join(TASKS)}, not {name!r}")
    return TASKS[name]


def evaluate(
    model: GPT, tokenizer: Tokenizer, name: str, data: Path, on_scored: OnScored | None = None, **settings: Any
) -> dict[str, Any]:
    """Return the metrics of a task on a file, with standard errors and every setting, as ``mlx-gpt eval --json`` does.

    A setting of None takes the task's default. Raises ``UsageError`` or ``DataError``.
    """
    task, given = find_task(name), {flag: value for flag, value in settings.items() if value is not None}
    for flag in given.keys() - set(task.settings):
        owners = " and ".join(other for other in TASKS if flag in TASKS[other].settings)
        raise UsageError(f"--{flag} is a setting of {owners}, not of {name}; leave it out")
    result = task.measure(model, tokenizer, data, on_scored, **given)
    return {
        "task": name,
        "figures": {metric: {"value": value, "stderr": error} for metric, (value, error) in result.metrics.items()},
        "n": result.n,
        "data_sha256": sha256_of(data),
        "tokenizer_sha256": tokenizer.hash,
        "settings": {"n_positions": model.config.n_positions, "dtype": str(model.wte.weight.dtype)} | result.settings,
        "changes": result.changes,
        "mlx": version("mlx"),
    }


def published(task: str, name: str, folder: Path, n_parameters: int) -> list[dict[str, Any]]:
    """Return published metrics of this model, identified by its id or by the bytes of its weights; else ``[]``."""
    candidates = {key: model for key, model in known_models().items() if model["parameters"] == n_parameters}
    if not candidates:  # without hashing the weights
        return []
    known = find_known(candidates, name, hash_files(folder.glob("*.safetensors")))
    return json.loads(PUBLISHED.read_text(encoding="utf-8")).get(known["ids"][0], {}).get(task, []) if known else []
