"""``run.toml``: all settings of a run, named like its flags, so that the run can be repeated and resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mlx_gpt.errors import UsageError
from mlx_gpt.files import atomic_write, read_small

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FILE = "run.toml"

MAX_SIZE = 1 << 20  # bytes
RunSettings = dict[str, Any]  # n_layer -> 4; without those that are None


def write_run_file(run: Path, settings: RunSettings) -> None:
    """Write the settings of a run to its folder."""
    import tomli_w

    again = f"# repeat it with: mlx-gpt train --config {run / RUN_FILE} --out NEW\n"
    atomic_write(run / RUN_FILE, again + tomli_w.dumps(settings))


def read_run_file(file: Path) -> RunSettings:
    """Return the settings in a file. Raises ``UsageError``."""
    try:
        return tomllib.loads(read_small(file, MAX_SIZE).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: expected the settings of a run, but it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested too deeply
        raise UsageError(f"{file}: expected settings as TOML, found something else ({error})") from error


def differences(run: RunSettings, now: RunSettings) -> list[str]:
    """Return the settings that differ from those of the run: ``steps = 100 (the run has 200)``."""
    return [
        f"{name} = {now.get(name, 'not set')} (the run has {run.get(name, 'none')})"
        for name in sorted(run.keys() | now.keys())
        if run.get(name) != now.get(name)
    ]
