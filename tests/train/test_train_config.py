"""A setting of training that cannot work is refused with its flag."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gpt.errors import UsageError
from mlx_gpt.train.config import TrainConfig


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"tokens": 0},
        {"epochs": 0.0},
        {"epochs": float("inf")},
        {"minutes": 0.0},
        {"minutes": float("nan")},
        {"batch_size": 0},
        {"accumulate": 0},
        {"dtype": "float64"},
        {"optimizer": "sgd"},
        {"schedule": "line"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"muon_learning_rate": -1.0},
        {"final_learning_rate": 1.0},
        {"warmup": -0.1},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"beta1": 1.0},
        {"beta2": 1.5},
        {"grad_clip": 0.0},
        {"eval_every": -1},
        {"eval_windows": -1},
        {"patience": -1},
        {"checkpoint_every": -1},
        {"keep": 0},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_an_invalid_setting_is_refused_with_its_flag(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be .*{value}"):
        TrainConfig(**settings)
