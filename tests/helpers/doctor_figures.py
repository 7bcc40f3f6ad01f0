"""Runs of the doctor on planted faults and healthy models, in processes, and the table of what it named."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from .planted import Base, Given, Planted

GROUPS = tuple(sorted(path.stem.removeprefix("planted_") for path in Path(__file__).parent.glob("planted_*.py")))
DRAWS, STEPS = ("sample", "sample_many", "sample_settings"), ("step", "new_step")  # arguments whose checks take longest
COSTLY = {"sampling": STEPS, "optimisation": DRAWS, "level": STEPS}  # those that the runs of a group omit; else both
MORE = ("together", "healthy", "foreign")  # groups of runs that plant no fault in a base
CHUNK = 4  # runs of a process at a time
MINUTES = 10  # more than any run takes, so that a busy machine gives the same results


@dataclass(frozen=True)
class Run:
    """One examination: of a planted fault, of several at once, of a healthy model, or of another author's GPT."""

    group: str
    name: str
    size: int = 0
    seed: int = 0
    trained: bool = False
    library: str = "mlx"
    everything: bool = False  # with all arguments, else without the costly ones of other groups

    def __str__(self) -> str:
        if self.group in ("healthy", "foreign"):
            return f"{self.group}: {self.name}"
        state = "trained" if self.trained else "untrained"
        return f"{self.group}: {self.name} (size {self.size}, seed {self.seed}, {state}, {self.library})"


@dataclass(frozen=True)
class Result:
    run: Run
    expected: tuple[str, ...]  # codes in the order of repair; any of a|b
    named: tuple[str, ...]  # codes of faults, and of warnings where one is expected
    seconds: float
    text: str  # of the report

    @property
    def right(self) -> bool:
        pairs = zip(self.named, self.expected, strict=False)
        return len(self.named) == len(self.expected) and all(one in codes.split("|") for one, codes in pairs)


def faults_of(group: str) -> dict[str, Planted]:
    return importlib.import_module(f".planted_{group}", __package__).FAULTS


def runs(groups: Sequence[str], quick: bool = False, full: bool = False) -> Iterator[Run]:
    """Yield runs of each fault: at size 0 untrained and trained, at sizes 1 and 2 in one of the two states.

    Each size with another seed. In PyTorch one size. Seeds, sizes and states change from fault to fault. Every eighth
    fault is examined by all checks too. Full: all three seeds, sizes and states. Quick: size 0 and seed 0, not by all
    checks.
    """
    for group in groups:
        for i, (name, planted) in enumerate(faults_of(group).items()):
            for library, trained, size in product(planted.libraries, planted.states, planted.sizes):
                place = size if len(planted.states) == 1 else 2 * size + trained
                few: tuple[int, ...] = (0, 1, 2 + i % 2, 4 + (i + 1) % 2)
                if library != planted.libraries[0]:
                    few = (i % 4,)
                chosen = size == planted.sizes[0] if quick else full or len(planted.states) == 1 or place in few
                for seed in (0,) if quick else range(3) if full else ((size + i) % 3,):
                    if chosen:
                        yield Run(group, name, size, seed, trained, library)
            if not quick and i % 8 == 0:
                yield Run(group, name, planted.sizes[0], 3, planted.states[-1], planted.libraries[0], True)


def foreign() -> dict[str, tuple[Callable[[], Given], tuple[str, ...]]]:
    """Return the GPTs of other authors: their arguments, and the codes of their mistake."""
    names = ["foreign_gpts", *(["foreign_torch_gpts"] if importlib.util.find_spec("torch") else [])]
    libraries = [importlib.import_module(f".{name}", __package__) for name in names]
    found = {author: (build, ()) for library in libraries for author, build in library.PEOPLE.items()}
    for library in libraries:
        for (author, mistake), codes in library.MISTAKES.items():
            found[f"{author}, {mistake}"] = (partial(library.PEOPLE[author], mistake), (codes,))
    return found


def arguments(run: Run) -> tuple[Given, tuple[str, ...]]:
    """Return the arguments of ``examine`` and the codes that are to be named."""
    if run.group == "healthy":
        from .healthy_gpts import HEALTHY

        return HEALTHY[run.name](), ()
    if run.group == "foreign":
        from mlx_gpt.check.doctor.codes import group_of

        build, codes = foreign()[run.name]
        return (
            build() if run.everything or not codes else without_costly(build(), group_of(codes[0].split("|")[0]))
        ), codes
    base = Base(run.size, run.seed, run.trained, run.library)
    if run.group == "together":
        from .faults_together import TOGETHER

        together = TOGETHER[run.name]
        return together.plant(base), together.codes
    planted = faults_of(run.group)[run.name]
    given = planted.plant(base)
    return (given if run.everything else without_costly(given, run.group)), (planted.code,)


def without_costly(given: Given, group: str) -> Given:
    """Return the arguments without those that the runs of a group omit."""
    omitted = COSTLY.get(group, DRAWS + STEPS)
    return {name: value for name, value in given.items() if name not in omitted}


def result_of(run: Run) -> Result:
    from mlx_gpt.check.doctor import examine

    given, expected = arguments(run)
    start = time.perf_counter()
    report = examine(**{"minutes": MINUTES, **given})
    seconds = time.perf_counter() - start
    named = tuple(one.code for one in report.findings if one.severity == "fault" or one.code in expected)
    return Result(run, expected, named, seconds, str(report))


def results(runs: Sequence[Run], jobs: int, shuffle: bool = False) -> Iterator[Result]:
    """Run in processes that each take some runs of one model, which they train once; in a random order of these."""
    context = multiprocessing.get_context("spawn")
    ordered = sorted(runs, key=lambda run: (run.library, run.size, run.seed, run.trained, run.group))
    some = [ordered[i : i + CHUNK] for i in range(0, len(ordered), CHUNK)]
    if shuffle:
        random.Random(0).shuffle(some)
    with context.Pool(jobs, start) as pool:
        for done in pool.imap_unordered(all_tried, some):
            yield from done


def start() -> None:
    """Prepare a process: one thread for each, and OpenBLAS before MLX."""
    import os

    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    import mlx_gpt  # noqa: F401

    if importlib.util.find_spec("torch"):
        importlib.import_module("torch").set_num_threads(1)


def all_tried(runs: Sequence[Run]) -> list[Result]:
    return [tried(run) for run in runs]


def tried(run: Run) -> Result:
    try:
        return result_of(run)
    except Exception as error:  # of the doctor or of the plant: a miss, which the table states
        return Result(run, ("?",), (f"{type(error).__name__}: {error}",), 0.0, "")


def record(result: Result, path: Path) -> None:
    """Append a result to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def recorded(path: Path) -> list[Result]:
    """Return the results in a file, the latest of each run; none where there is no file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [
        Result(Run(**one["run"]), tuple(one["expected"]), tuple(one["named"]), one["seconds"], one["text"])
        for one in lines
    ]
    return list({one.run: one for one in found}.values())


def share(results: Sequence[Result]) -> str:
    return f"{sum(one.right for one in results)}/{len(results)}" if results else "–"


def table(found: Sequence[Result]) -> str:
    """Return the shares named rightly and alone, by group, as Markdown."""
    columns: dict[str, Any] = {
        "faults": lambda run: True,
        **{f"size {size}": lambda run, size=size: run.size == size and not run.everything for size in range(3)},
        "untrained": lambda run: not run.trained,
        "trained": lambda run: run.trained,
        "PyTorch": lambda run: run.library == "torch",
        "all checks": lambda run: run.everything,
    }
    lines = ["| group | faults | all runs | " + " | ".join([*columns][1:]) + " | seconds, median, longest |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for group in dict.fromkeys(one.run.group for one in found):
        its = [one for one in found if one.run.group == group]
        seconds = sorted(one.seconds for one in its)
        cells = [group, str(len({one.run.name for one in its}))]
        cells += [share([one for one in its if belongs(one.run)]) for belongs in columns.values()]
        cells.append(f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def misses(found: Sequence[Result]) -> str:
    """Return a line for each run in which something else was named."""
    return "\n".join(
        f"{one.run}: expected {', '.join(one.expected) or 'no fault'}; named {', '.join(one.named) or 'none'}"
        for one in sorted(found, key=lambda one: str(one.run))
        if not one.right
    )


def seconds_of_ten_million() -> dict[str, float]:
    """Return the seconds that each group's checks take on a model of 10M parameters with a context of 256."""
    from mlx_gpt.check.doctor.checks import CHECKS
    from mlx_gpt.check.doctor.codes import group_of
    from mlx_gpt.check.doctor.examine import make_case, run_checks

    base = Base(1).with_faults(width=320, layers=8, heads=8, n_positions=256)
    given = base.arguments(val_loss=None)
    size = sum(array.size for array in given["parameters"]().values())
    begun: list[tuple[str, float]] = [("", time.perf_counter())]
    report = run_checks(make_case(given), CHECKS, lambda check: begun.append((check.code, time.perf_counter())))
    begun.append(("", time.perf_counter()))
    seconds: dict[str, float] = {f"{size / 1e6:.1f}M parameters": 0.0}
    for (code, start), (_, end) in pairwise(begun[1:]):
        seconds[group_of(code)] = seconds.get(group_of(code), 0) + end - start
    exact = ("contract", "state", "causality", "inputs", "cache", "targets and data", "weights")
    seconds["exact checks"] = sum(seconds.get(group, 0) for group in exact)
    seconds["all checks"] = begun[-1][1] - begun[0][1]
    seconds |= {f"no time for {code}": 0.0 for code, what in report.skipped.items() if what == "minutes"}
    seconds |= {f"named {one.code}": 0.0 for one in report.findings if one.severity == "fault"}
    return seconds
