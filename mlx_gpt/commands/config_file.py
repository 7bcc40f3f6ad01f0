"""Flags of ``mlx-gpt train`` from a file: the ``run.toml`` of a run, or one of the user's own."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mlx_gpt.commands.given import given_settings, option
from mlx_gpt.commands.train_flags import FILE_MAY_SET, REPLACES, Architecture, TrainFlags
from mlx_gpt.errors import UsageError
from mlx_gpt.store.run_file import RUN_FILE, read_run_file
from mlx_gpt.train.config import TrainConfig


def with_file(argv: Sequence[str]) -> list[str]:
    """Insert the settings of ``--config FILE`` or ``--resume RUN`` before the other flags, which override them.

    A flag may also replace other settings of the file: ``--tokens`` replaces ``steps``. Raises ``UsageError`` for a
    file that cannot be used.
    """
    run, config, given = option(argv, "resume"), option(argv, "config"), given_settings(argv)
    if run and (excluded := [f"--{name}" for name in ("config", "out", "preset") if name in given]):
        raise UsageError(
            f"--resume continues a run in its own folder, with its own settings: remove {', '.join(excluded)}"
        )
    if not (run or config):
        return list(argv)
    file = Path(run) / RUN_FILE if run else Path(config or "")
    if run and not file.exists():
        raise UsageError(f"{run}: expected the folder of a run to resume, found no {RUN_FILE} in it")
    settings = read_run_file(file)
    if unknown := sorted(settings.keys() - FILE_MAY_SET):
        raise UsageError(f"{file}: unknown setting {', '.join(unknown)}; mlx-gpt train --help lists the names as flags")
    replaced = {name for flag in given for name in REPLACES.get(flag, ())}
    flags = [_as_flag(name, value, file) for name, value in settings.items() if name not in replaced]
    return [*flags, *([f"--out={run}"] if run else []), *argv]


def _kinds(name: str) -> list[type]:
    """Return the types that a setting may have in a file."""
    hints = {**get_type_hints(TrainFlags), **get_type_hints(Architecture), **get_type_hints(TrainConfig)}
    hint = hints["text_field" if name == "field" else name]
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not NoneType]
    return [int, float] if kinds == [float] else [str] if kinds == [Path] else kinds


def _as_flag(name: str, value: Any, file: Path) -> str:
    flag = name.replace("_", "-")
    kinds = _kinds(name)
    if type(value) not in kinds or "\0" in str(value):  # a command line has no zero byte either
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{file}: {name} must be one value ({expected}), not {reprlib.repr(value)}")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"
