"""Measure the quantities of the doctor's level checks: ``python tests/benchmarks/doctor_level.py [seeds]``.

Small GPTs are trained on much text, on little, and too shortly. The largest of the sound runs and the smallest of the
others stand beside the thresholds in ``level/training.py`` and ``level/reported.py``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.planted import Base

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.level.loss import ladder, training_loss, validation_loss
from mlx_gpt.check.doctor.level.training import falling

EVERY = 20  # steps between two validation losses


def measured(base: Base, steps: int, tokens: int | None = None) -> dict[str, float]:
    """Train on the first tokens of the text; return fall, rise and gap, as the checks define them."""
    run = replace(base, trained=False)
    run.__dict__["model"] = base.new_model()
    ids = base.train_ids[:tokens]
    given: dict[str, Any] = run.arguments(train_ids=ids, metrics=None, val_loss=0.0)
    step, batches, losses = given["new_step"](), run.windows(ids=ids), []
    for i in range(1, steps + 1):
        step(*next(batches))
        if i % EVERY == 0:
            losses.append((i, run.mean_loss(base.val_ids, 64)))
    at, values = np.array(losses).T
    case = Case(given, given.pop("vocab_size"), given.pop("n_positions"), minutes=10.0)
    val, train, rungs = case.once(validation_loss), case.once(training_loss), case.once(ladder)
    harder = max(0.0, rungs.losses["bigram"] - rungs.kin["bigram"])
    whole = run.mean_loss(base.val_ids)
    return {
        "fall": falling(at, values) / (log(case.vocab_size) - values[-1]),
        "rise": values[-1] / values.min() - 1,
        "gap": (val.mean - train.mean - harder) / val.mean,
        "reported": abs(val.mean - whole) / (6 * val.error + 0.05 + 0.02 * val.mean),
        "above counting": (val.mean - rungs.losses["trigram"]) / (rungs.losses["chance"] - rungs.losses["trigram"]),
    }


RUNS = {"sound, 1000 steps": (1000, None), "too short, 160 steps": (160, None), "2000 tokens, 1000 steps": (1000, 2000)}


def main(seeds: int) -> None:
    for name, (steps, tokens) in RUNS.items():
        rows = [measured(Base(size, seed), steps, tokens) for size in (0, 1) for seed in range(seeds)]
        print(name)
        for quantity in rows[0]:
            values = [row[quantity] for row in rows]
            print(f"  {quantity:<15} {min(values):7.3f} to {max(values):7.3f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
