"""The validation loss: the mean loss on text that the model is not trained on."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.windows import Windows
from mlx_gpt.train.distributed import rank, size
from mlx_gpt.train.step import EvalStep


def evaluate(
    model: GPT,
    step: EvalStep,
    windows: Windows,
    batch_size: int,
    n_windows: int = 0,
    group: mx.distributed.Group | None = None,
) -> float:
    """Return the mean loss in nats per token over the counted targets of ``n_windows`` evenly spread windows; 0: all.

    ``step`` comes from ``make_eval_step(model)``, once per run. Dropout is off. In a group each process evaluates its
    share of the windows, and all return the same mean.
    """
    was_training = model.training
    model.eval()
    n = min(n_windows or len(windows), len(windows))
    rows = np.linspace(0, len(windows) - 1, n).round().astype(int)[rank(group) :: size(group)]
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        x, y, counts = windows.batch(rows[i : i + batch_size])
        total += float(step(mx.array(x), mx.array(y), mx.array(counts)).item())  # type: ignore[arg-type]
        count += int(counts.sum())
    model.train(was_training)
    if group:
        total, count = np.array(mx.distributed.all_sum(mx.array([total, count]), group=group))
    return float(total / count)
