"""``mlx-gpt bench``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from mlx_gpt.errors import Stopped, UsageError, one_line


@dataclass(frozen=True)
class Bench:
    """Measure this machine's limits, and training and generation beside other implementations, in five minutes.

    Each has the same weights, which are random. Ctrl-C ends the measurement and shows what was measured.
    """

    part: Annotated[Positional[Literal["train", "generate", "all"]], arg(metavar="PART")] = "all"
    """train, generate or all"""
    against: Annotated[str | None, arg(metavar="NAMES", help_behavior_hint="")] = None
    """mlx-lm, torch (trains) and transformers (generates), separated by commas; by default those that are installed"""
    json: Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")] = False
    """print JSON, as in tests/benchmarks/results, instead of tables"""
    picture: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """draw the speeds as bars, to a .png or .svg file"""

    def __call__(self) -> None:
        from mlx_gpt.bench.measure import Workload, measure_generation, measure_training
        from mlx_gpt.bench.report import tables, write_picture
        from mlx_gpt.bench.system import describe, limits

        names = sides(self.against)
        if self.picture and (self.picture.suffix not in (".png", ".svg") or not self.picture.parent.is_dir()):
            raise UsageError(f"--picture {self.picture}: expected a .png or .svg file in a folder that exists")
        results: dict[str, Any] = {"system": describe()}
        stopped: KeyboardInterrupt | None = None
        try:
            results["limits"] = limits(progress)
            work = Workload()
            deadline = time.perf_counter() + work.budget
            if self.part in ("train", "all"):
                seconds = work.budget / (2 if self.part == "all" else 1)
                measure_training(names, work, seconds, results["limits"], progress, results.setdefault("training", {}))
            if self.part in ("generate", "all"):
                seconds, found = deadline - time.perf_counter(), results.setdefault("generation", {})
                measure_generation(names, work, seconds, results["limits"], progress, found)
        except KeyboardInterrupt as stop:
            stopped = stop
        progress("")
        print(json.dumps(results, indent=1) if self.json else "\n".join(tables(results)))
        if self.picture:
            write_picture(results, self.picture)
        if stopped:
            raise Stopped(getattr(stopped, "signum", 2), "stopped; this is what was measured")


def sides(against: str | None) -> list[str]:
    """Return the names of the implementations to measure, ours first. Raises ``UsageError`` for others."""
    from mlx_gpt.bench.sides import OURS, SIDES

    others = [name for name in SIDES if name != OURS]
    if against is None:
        return [OURS, *(name for name in others if SIDES[name].is_installed)]
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in others:
            raise UsageError(f"--against takes {', '.join(others)}, not {name!r}")
        if not SIDES[name].is_installed:
            raise UsageError(f"--against {name} needs {' and '.join(SIDES[name].needs)}: pip install -e '.[parity]'")
    return [OURS, *names]


def progress(text: str) -> None:
    """Show what is being measured in one line of stderr, if it is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{one_line(text)}", end="", file=sys.stderr, flush=True)
