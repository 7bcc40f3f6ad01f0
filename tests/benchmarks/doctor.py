"""Figures of the doctor: planted faults that it names, healthy models that it passes, and its time.

    python tests/benchmarks/doctor.py [--quick | --full] [--group GROUP ...] [--fault NAME] [--minutes M]
        [--record FILE] [--jobs 2]

Prints the table of tests/README.md, and each run in which something else was named than what was planted.
With --record, a run that was broken off is continued by the same command; begin a new file once the code has changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx_gpt  # noqa: F401  # isort: skip  # before MLX: it links OpenBLAS on Linux
from helpers.doctor_figures import (
    GROUPS,
    MORE,
    Run,
    foreign,
    misses,
    record,
    recorded,
    results,
    runs,
    seconds_of_ten_million,
    table,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="size 0 and seed 0 only")
    parser.add_argument("--full", action="store_true", help="three seeds of each size, untrained and trained")
    parser.add_argument("--group", nargs="*", choices=[*GROUPS, *MORE])
    parser.add_argument("--fault", help="a part of the name of a fault or model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the runs are in random order")
    parser.add_argument("--record", type=Path, help="JSON lines of results, which are not found again")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--time", action="store_true", help="only the time of a model of 10M parameters")
    parser.add_argument("--verbose", action="store_true", help="print the reports of wrong runs")
    chosen = parser.parse_args()
    if chosen.time:
        print_time()
        return
    groups = chosen.group or [*GROUPS, *MORE]
    planned = list(runs([group for group in groups if group in GROUPS], chosen.quick, chosen.full))
    if "together" in groups:
        from helpers.faults_together import TOGETHER

        planned += [Run("together", name, i % 3, i % 3, everything=True) for i, name in enumerate(TOGETHER)]
    if "healthy" in groups:
        from helpers.healthy_gpts import HEALTHY

        planned += [Run("healthy", name, everything=True) for name in HEALTHY]
    if "foreign" in groups:
        planned += [Run("foreign", name, everything=True) for name in foreign()]
    planned = [run for run in planned if not chosen.fault or chosen.fault in run.name]
    start = time.perf_counter()
    wanted = set(planned)
    found = [one for one in recorded(chosen.record) if one.run in wanted] if chosen.record else []
    wanted -= {one.run for one in found}
    for one in results([run for run in planned if run in wanted], chosen.jobs, chosen.minutes < float("inf")):
        found.append(one)
        if chosen.record:
            record(one, chosen.record)
        if len(found) % 50 == 0:
            print(f"{len(found)} of {len(planned)}, {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
        if not one.right:
            print(misses([one]), flush=True)
            if chosen.verbose:
                print(one.text)
        if time.perf_counter() - start > 60 * chosen.minutes:
            break
    print(f"\n{table(sorted(found, key=lambda one: (*GROUPS, *MORE).index(one.run.group)))}\n")
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(found)} of {len(planned)} examinations in {minutes:.1f} minutes, {chosen.jobs} processes")
    print(misses(found) or "no miss")
    if not (chosen.group or chosen.fault or chosen.quick):
        print_time()


def print_time() -> None:
    """Print the seconds of each group's checks for a model of 10M parameters, one process, two BLAS threads."""
    print(
        ", ".join(f"{name} {seconds:.1f} s" if seconds else name for name, seconds in seconds_of_ten_million().items())
    )


if __name__ == "__main__":
    main()
