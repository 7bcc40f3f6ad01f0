"""Check the types and values of ``examine``'s arguments before anything is examined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import NotNumbers, as_numpy
from mlx_gpt.errors import UsageError
from mlx_gpt.files import expand_user, open_file, parse_json

FUNCTIONS = ["forward", "forward_training", "loss", "gradient", "parameters", "load_parameters", "step", "new_step"]
FUNCTIONS += ["sample", "sample_many", "cached", "reload", "encode", "decode", "encode_training", "batches"]
NUMBERS = {"learning_rate": "the learning rate of step", "val_loss": "the loss that was reported"}
# The settings that are examined, of those that sample accepts, and their values for off.
OFF: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
MOST_METRICS = 1 << 30  # bytes of a file


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None, numbers as Python's, ids as one array (N,), ``metrics`` as dicts.

    Raises ``TypeError``, or ``UsageError``, which is a ``ValueError``, with one line.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    if "forward" not in arguments:
        raise TypeError("forward is missing; give a function from ids (B, T) to logits (B, T, V), or a module")
    if isinstance(arguments["forward"], type):
        name = arguments["forward"].__name__
        raise TypeError(f"forward must be a function, or a module, not a class; give an instance of {name}")
    for name in FUNCTIONS:
        if not callable(arguments.get(name, callable)):
            more = ", or a module of MLX or torch" if name == "forward" else ""
            raise TypeError(f"{name} must be a function{more}, not {kind(arguments[name])}")
    for name in ("vocab_size", "n_positions"):
        arguments[name] = whole_number(name, arguments.get(name), 1)
    if "end_of_text" in arguments:
        arguments["end_of_text"] = whole_number("end_of_text", arguments["end_of_text"], 0)
    for name, what in NUMBERS.items():
        if name in arguments:
            arguments[name] = number(name, arguments[name], what)
    if arguments.get("learning_rate", 0) < 0:
        raise UsageError(f"learning_rate must be at least 0, not {arguments['learning_rate']:g}")
    if not isfinite(arguments.get("val_loss", 0.0)):
        del arguments["val_loss"]  # NaN or infinity; the checks find why
    arguments["minutes"] = number("minutes", arguments.get("minutes", 1.0), "the time that the examination may take")
    if arguments["minutes"] <= 0:
        raise UsageError(f"minutes must be above 0, not {given['minutes']!r}")
    for name in ("train_ids", "val_ids"):
        if name in arguments:
            arguments[name] = ids_of(name, arguments[name])
    if not isinstance(arguments.get("train_text", ""), str):
        raise TypeError(f"train_text must be a str, the text itself, not {kind(arguments['train_text'])}")
    if "sample_settings" in arguments:
        arguments["sample_settings"] = names(arguments["sample_settings"])
    if "metrics" in arguments:
        arguments["metrics"] = rows_of(arguments["metrics"])
    return arguments


def kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}" if isinstance(value, (str, int, float)) else type(value).__name__


def whole_number(name: str, value: Any, least: int) -> int:
    if value is None:
        raise TypeError(f"{name} is missing; give a whole number (a module's config may hold it as {name})")
    try:
        converted = as_numpy(value)
    except (TypeError, ValueError):
        converted = None
    if converted is None or converted.shape != () or converted.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a whole number, not {kind(value)}")
    if converted < least:
        raise UsageError(f"{name} must be at least {least}, not {converted}")
    return int(converted)


def number(name: str, value: Any, what: str) -> float:
    try:
        converted = as_numpy(value)
    except (TypeError, ValueError):
        converted = None
    if converted is None or converted.size != 1 or converted.dtype.kind == "b":
        raise TypeError(f"{name} must be a number, {what}, not {kind(value)}")
    if name != "val_loss" and not isfinite(converted.item()):
        raise UsageError(f"{name} must be a finite number, {what}, not {converted.item()}")
    return float(converted.item())


def ids_of(name: str, value: Any) -> np.ndarray:
    """Return the ids of a text, or of a list of documents, as one array (N,). A memory-mapped text is not read.

    Raises ``TypeError`` or ``UsageError`` for anything else, or without an id.
    """
    try:
        n = len(value)
    except TypeError:
        n = None
    if n is None or isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be an array or list of ids, not {kind(value)}; encode the text first")
    try:
        ids = joined(value) if n else np.zeros(0, int)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must hold ids, whole numbers, or documents of ids, not {kind(next(iter(value)))}"
        ) from None
    if not ids.size:
        raise UsageError(f"{name} is empty; give at least one id, or leave {name} out")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ids, whole numbers, not {ids.dtype}")
    return ids


def joined(value: Any) -> np.ndarray:
    """Return an array of any shape, or documents of any lengths, as one array (N,)."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.reshape(-1)
    try:
        return as_numpy(value).reshape(-1)
    except NotNumbers:  # documents of different lengths; an empty list would be one of float64
        documents = [as_numpy(document).reshape(-1) for document in value if len(document)]
        return np.concatenate(documents) if documents else np.zeros(0, int)


def names(value: Any) -> frozenset[str]:
    if isinstance(value, str) or not hasattr(value, "__iter__") or not all(isinstance(name, str) for name in value):
        raise TypeError(
            f'sample_settings must be a set of names, such as {{"temperature", "top_k"}}, not {kind(value)}'
        )
    for name in value:
        plain = re.sub(r"\W|_", "", name.lower())
        meant = [known for known in OFF if len(plain) > 3 and known.replace("_", "").startswith(plain)]
        meant = meant or get_close_matches(name, [known for known in OFF if len(known) > 5], 1, 0.8)
        if meant and name not in OFF:
            raise UsageError(
                f"sample_settings has {name!r}; expected {meant[0]!r}, and a sample that takes it so named"
            )
    return frozenset(value)


def rows_of(metrics: Any) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, or of a list of dicts."""
    if isinstance(metrics, (str, Path)):
        return read_metrics(expand_user(metrics))
    if isinstance(metrics, Mapping) or not isinstance(metrics, Sequence):
        raise TypeError(f"metrics must be the path of a metrics.jsonl or a list of dicts, not {kind(metrics)}")
    for i, row in enumerate(metrics):
        if not isinstance(row, Mapping):
            raise TypeError(f"metrics[{i}] must be a dict with step and loss, not {kind(row)}")
        check_row(f"metrics[{i}]", row)
    if not metrics:
        raise UsageError("metrics is empty; give at least one row, or leave metrics out")
    if not any("step" in row for row in metrics):
        raise UsageError(
            f'metrics: no row has a step; expected rows such as {{"step": 1, "loss": 5.5}}, not {metrics[0]}'
        )
    return [dict(row) for row in metrics]


def check_row(where: str, row: Mapping[str, Any]) -> None:
    for name in ("step", "loss", "val_loss"):
        if isinstance(row.get(name), str):
            raise UsageError(f"{where}: {name} must be a number, not {kind(row[name])}")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON objects, one a line."""
    try:
        with open_file(file) as stream:
            content = stream.read(MOST_METRICS)
    except OSError as error:
        raise UsageError(f"{file}: expected a metrics.jsonl, but it cannot be read ({error.strerror})") from error
    rows = []
    lines = content.split(b"\n")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            what = "is cut off in the middle" if i == len(lines) else f"is not a JSON object: {line[:40]!r}"
            raise UsageError(f'{file}: line {i} {what}; expected rows such as {{"step": 1, "loss": 5.5}}; remove it')
        check_row(f"{file}: line {i}", row)
        rows.append(row)
    if not rows:
        raise UsageError(f'{file}: holds no metrics; expected rows such as {{"step": 1, "loss": 5.5}}')
    return rows
