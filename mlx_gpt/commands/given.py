"""The flags that are given on a command line, before it is parsed, and those of them that have no effect."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence

from mlx_gpt.errors import UsageError


def option(argv: Sequence[str], name: str) -> str | None:
    """Return the value of one option, before the whole command line is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def given_settings(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the given settings: ``--n-layer=3 --no-recompute`` -> n_layer, recompute."""
    flags = (word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def refuse_idle(given: Collection[str], idle: Mapping[str, str]) -> None:
    """Raise ``UsageError`` for a given setting that has no effect; ``idle`` has the reason for each such setting."""
    for name in sorted(idle.keys() & given):
        raise UsageError(f"--{name.replace('_', '-')} has no effect {idle[name]}; remove one of them")
