"""The validation loss: how a model does on text that it is not trained on."""

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
    """The validation loss: mean nats per token over the counted targets of ``n_windows`` (0: all), evenly spread.

    ``step`` is what ``make_eval_step(model)`` returned, to be made once for a run. Dropout is off meanwhile. In a group
    each process measures its share of the windows, and all get the same mean.
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
