"""The arguments of ``examine``: what is wrong with them is raised in one line, before anything is examined."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.check.doctor import examine
from mlx_gpt.check.doctor.examine import make_case
from mlx_gpt.check.doctor.probes import own_text


def forward(ids: np.ndarray) -> np.ndarray:
    raise AssertionError("called before the arguments were checked")


SOUND: dict[str, Any] = {"forward": forward, "vocab_size": 5, "n_positions": 8, "minutes": 0.01}
TYPES = {
    "forward must be a function, or a module of MLX or torch, not str 'model'": {"forward": "model"},
    "forward must be a function, or a module, not a class; give an instance of dict": {"forward": dict},
    "forward is missing": {"forward": None},
    "step must be a function, not str 'adam'": {"step": "adam"},
    "vocab_size must be a whole number, not float 5.0": {"vocab_size": 5.0},
    "vocab_size is missing": {"vocab_size": None},
    "n_positions must be a whole number, not bool": {"n_positions": True},
    "minutes must be a number": {"minutes": "1"},
    "learning_rate must be a number": {"learning_rate": [1, 2]},
    "val_ids must be an array or list of ids, not str": {"val_ids": "a text"},
    "train_ids must be an array or list of ids, not generator": {"train_ids": (i for i in range(3))},
    "train_ids must hold ids, whole numbers, not float64": {"train_ids": np.array([0.5, 1.0])},
    "val_ids must hold ids, whole numbers, not float64": {"val_ids": [[0.5, 1], [2]]},
    "val_ids must hold ids, whole numbers, or documents of ids, not str 'one'": {"val_ids": ["one", "two"]},
    "train_text must be a str": {"train_text": ["a", "b"]},
    "sample_settings must be a set of names": {"sample_settings": "temperature"},
    "metrics must be the path": {"metrics": 5},
    "metrics[1] must be a dict": {"metrics": [{"step": 1, "loss": 2.0}, 3]},
    "end_of_text must be a whole number": {"end_of_text": "<|endoftext|>"},
}
VALUES = {
    "vocab_size must be at least 1, not 0": {"vocab_size": 0},
    "minutes must be above 0": {"minutes": 0},
    "minutes must be a finite number": {"minutes": float("nan")},
    "val_ids is empty": {"val_ids": np.zeros(0, np.int32)},
    "train_ids is empty": {"train_ids": []},
    "val_ids is empty; give": {"val_ids": [[], []]},
    "learning_rate must be at least 0, not -1": {"learning_rate": -1},
    "sample_settings has 'temprature'; expected 'temperature'": {"sample_settings": {"temprature"}},
    "sample_settings has 'temp'; expected 'temperature'": {"sample_settings": {"temp", "top_k"}},
    "sample_settings has 'topk'; expected 'top_k'": {"sample_settings": {"topk", "stop", "top_a"}},
    "metrics is empty": {"metrics": []},
    "metrics[1]: loss must be a number, not str '3'": {"metrics": [{"step": 1, "loss": 4}, {"step": 2, "loss": "3"}]},
    "metrics: no row has a step": {"metrics": [{"foo": 1}]},
    "metrics.jsonl: expected a metrics.jsonl, but it cannot be read (No such file": {"metrics": "no/metrics.jsonl"},
}


@pytest.mark.parametrize(("message", "wrong"), TYPES.items())
def test_wrong_types_raise_a_type_error_of_one_line(message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=re.escape(message)) as error:
        examine(**{**SOUND, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("message", "wrong"), VALUES.items())
def test_wrong_values_raise_a_value_error_of_one_line(message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        examine(**{**SOUND, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "loss": 5.5}\n{"step": 2, "lo', "line 2 is cut off in the middle"),
        ('{"step": 1, "loss": 5.5}\nstep 2\n{"step": 3, "loss": 5.0}\n', "line 2 is not a JSON object: b'step 2'"),
        ("[" * 100_000, "line 1 is cut off in the middle"),
        ("\n", "holds no metrics"),
    ],
)
def test_damaged_metrics_are_refused_with_the_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        make_case({**SOUND, "metrics": file})


def test_numbers_of_any_library_and_metrics_of_a_file_become_plain(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 5.5}\n')
    given = {**SOUND, "vocab_size": np.int64(5), "val_loss": np.float32(1.5), "metrics": str(file)}
    case = make_case(given)
    assert type(case.vocab_size) is int
    assert case.given["val_loss"] == 1.5
    assert case.given["metrics"] == [{"step": 1, "loss": 5.5}]


@pytest.mark.parametrize("kind", [list, np.array, mx.array])
def test_documents_of_any_lengths_become_one_array_of_ids(kind: Callable[[list[int]], Any]) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6]]
    case = make_case(
        {**SOUND, "vocab_size": 9, "train_ids": [kind(part) for part in documents if part or kind is list]}
    )
    assert case.given["train_ids"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (text := own_text(case, rows=4, length=2)) is not None
    assert text.shape == (4, 2)


def test_a_memory_mapped_text_is_not_read(tmp_path: Path) -> None:
    np.arange(6, dtype=np.uint16).reshape(2, 3).tofile(tmp_path / "ids")
    ids = np.memmap(tmp_path / "ids", np.uint16, "r", shape=(2, 3))
    given = make_case({**SOUND, "val_ids": ids}).given["val_ids"]
    assert given.shape == (6,)
    assert np.shares_memory(given, ids)
