"""The flags of ``mlx-gpt train`` that stand in a file: a run's ``run.toml``, or one of the user's own."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_gpt.errors import UsageError
from mlx_gpt.store.run_file import RUN_FILE, read_run_file


def option(argv: Sequence[str], name: str) -> str | None:
    """What a command line gives an option, before all of it is read."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument(f"--{name}", nargs="?", dest="value")
    return scout.parse_known_args(argv)[0].value


def given(argv: Sequence[str]) -> frozenset[str]:
    """The names of the settings that a command line gives: ``--n-layer=3 --no-recompute`` -> n_layer, recompute."""
    flags = (word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def with_file(argv: Sequence[str], names: Collection[str], replaced: Mapping[str, Collection[str]]) -> list[str]:
    """The command line with the settings of ``--config FILE``, or of ``--resume RUN``, put before its own, which win.

    ``names`` are those that a file may set. ``replaced`` says what in a file a flag makes void: ``--tokens`` its
    ``steps``. Raises ``UsageError`` for a file that cannot be read.
    """
    run, config = option(argv, "resume"), option(argv, "config")
    if run and (config or "out" in given(argv)):
        raise UsageError(
            "--resume goes on with a run in its own folder, by its own settings: leave out --out, --config"
        )
    if not (run or config):
        return list(argv)
    file = Path(run) / RUN_FILE if run else Path(config or "")
    if run and not file.exists():
        raise UsageError(f"{run}: expected the folder of a run to resume, found no {RUN_FILE} in it")
    settings = read_run_file(file)
    if unknown := sorted(settings.keys() - set(names)):
        raise UsageError(
            f"{file}: unknown setting {', '.join(unknown)}; they are called like the flags of train --help"
        )
    void = {name for flag in given(argv) for name in replaced.get(flag, ())}
    flags = [_as_flag(name, value, file) for name, value in settings.items() if name not in void]
    return [*flags, *([f"--out={run}"] if run else []), *argv]


def _as_flag(name: str, value: Any, file: Path) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"{file}: {name} must be one value, not {value!r}")
    return f"--{flag}={value}"
