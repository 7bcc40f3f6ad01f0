"""``mlx-gpt doctor``: examine a run, a model, or a function of the user's, and print the report."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

from tyro.conf import Positional, arg

from mlx_gpt.commands.generation_flags import note
from mlx_gpt.errors import MLXGPTError, UsageError, VerificationError
from mlx_gpt.terminal import make_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_gpt.check.doctor import Report
    from mlx_gpt.check.doctor.case import Case
    from mlx_gpt.check.doctor.checks import DoctorCheck
    from mlx_gpt.check.doctor.examine import Examination

end_process = os._exit  # which raises while a function of the user's is called
WIDTH = 100  # of a report in a file or pipe
OF_TEXT = {"train_ids", "val_ids", "train_text", "batches"}


@dataclass(frozen=True)
class Doctor:
    """Find out why a model writes gibberish although its loss falls.

    Examines the model, its sampling, its cache, its tokenizer, its data and its training, and prints what is wrong, in
    the order in which to repair it. The exit code is 1 if there is a fault, 2 if the examination cannot begin.
    """

    subject: Annotated[Positional[str], arg(metavar="MODEL|FILE.py:FUNCTION")]
    """the folder of a run or of a model, or a function of your own, my_gpt.py:build, that returns a dict of the
    arguments of mlx_gpt.check.doctor.examine"""
    data: str | None = None
    """the text that the model was trained on; default the run's own"""
    minutes: float | None = None
    """the time that the examination may take; default 1"""
    json: bool = False
    """print the report as JSON"""

    def __call__(self) -> None:
        from mlx_gpt.check.doctor.checks import CHECKS
        from mlx_gpt.check.doctor.examine import Examination, make_case

        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"--minutes must be a number above 0, not {self.minutes:g}")
        given = {} if self.minutes is None else {"minutes": self.minutes}
        with ExitStack() as stack:
            started = time.monotonic()
            try:
                arguments = self._arguments(stack)
                reading = time.monotonic() - started
                case = make_case({**arguments, **given})
            except (MLXGPTError, TypeError) as error:
                raise UsageError(str(error)) from error
            except Exception as error:
                if not is_file(self.subject):
                    raise
                raise UsageError(f"{self.subject}: {type(error).__name__}: {error}") from error
            case.end -= min(reading, case.seconds_left() / 2)
            examination, known = Examination(case, CHECKS), "train_ids" in arguments
            with (
                silent_descriptors() as (out, terminal),
                progress(case, terminal) as bar,
                watched(examination, lambda report: self._give_up(report, known, out, terminal, bar)),
            ):
                report = examination.run(bar.update)
        self._conclude(report, known)

    def _conclude(self, report: Report, text_known: bool) -> None:
        """Print the report. Raises ``MLXGPTError`` if the exit code is not 0."""
        self._print(report)
        if not report.examined and report.ok:
            raise UsageError(f"{self.subject}: nothing could be examined; give more --minutes, or make forward faster")
        unknown = [code for code, need in report.skipped.items() if set(need.split("|")) & OF_TEXT]
        if unknown and not text_known and not is_file(self.subject):
            note(f"the text of its training is not known; --data TEXT allows {len(unknown)} more checks")
        if faults := [finding.code for finding in report.findings if finding.severity == "fault"]:
            count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
            raise VerificationError(f"{self.subject}: {count}, to repair first: {faults[0]}")

    def _give_up(self, report: Report, text_known: bool, out: TextIO, terminal: TextIO, bar: Bar) -> NoReturn:
        """Print the report so far and end the process, since a function of the user's does not return."""
        bar.stop()
        sys.stdout, sys.stderr, code = out, terminal, 0
        try:
            self._conclude(report, text_known)
        except MLXGPTError as error:
            print(f"mlx-gpt: {error}", file=terminal)
            code = 2 if isinstance(error, UsageError) else 1
        finally:
            out.flush()
            terminal.flush()
            end_process(code)

    def _arguments(self, stack: ExitStack) -> dict[str, Any]:
        """Return the arguments of ``examine``; ``stack`` closes what they use. Raises ``MLXGPTError``."""
        from mlx_gpt.check.doctor.build import built_arguments
        from mlx_gpt.check.doctor.own import own_arguments
        from mlx_gpt.files import expand_user

        path = expand_user(self.subject)
        if is_file(self.subject):
            if self.data is not None:
                raise UsageError("--data is for a folder; let the function return train_ids and train_text instead")
            with make_console(stderr=True).status(f"loading {self.subject}"):
                return built_arguments(self.subject)
        if not self.subject or not path.exists():
            expected = "expected the folder of a run or of a model, or FILE.py:FUNCTION"
            raise UsageError(f"{self.subject or repr('')}: {expected}; nothing has this name")
        with make_console(stderr=True).status("reading"):
            return stack.enter_context(own_arguments(path, self.data, note))

    def _print(self, report: Report) -> None:
        if self.json:
            print(report.to_json())
        else:
            width = None if sys.stdout.isatty() else WIDTH
            make_console(highlight=False, width=width).print(report)


def is_file(subject: str) -> bool:
    """Return True if the subject is the name of a Python file, with or without a function."""
    return bool(re.search(r"\.py(:[^/]*)?$", subject)) and not os.path.isdir(os.path.expanduser(subject))


@contextmanager
def silent_descriptors() -> Iterator[tuple[TextIO, TextIO]]:
    """Drop all that the process prints, also from C and from threads; yield the stdout and stderr of before."""
    with ExitStack() as stack, open(os.devnull, "wb") as nothing:
        kept = []
        for number in (1, 2):
            copy = os.dup(number)
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, number)
            os.dup2(nothing.fileno(), number)
            kept.append(stack.enter_context(open(copy, "w", encoding="utf-8", closefd=False)))
        with redirect_stdout(io.StringIO()):
            yield kept[0], kept[1]


@contextmanager
def watched(examination: Examination, give_up: Callable[[Report], object]) -> Iterator[None]:
    """Call ``give_up`` with the report so far if a call does not end, such as one that never returns from C."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if (failure := examination.case.blocked()) and not over.wait(0.5) and examination.case.blocked():
                give_up(examination.ended_by(failure))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@dataclass
class Bar:
    """The line on a terminal that shows the check in progress and the time left."""

    update: Callable[[DoctorCheck], object]
    stop: Callable[[], object]


@contextmanager
def progress(case: Case, terminal: TextIO) -> Iterator[Bar]:
    """Show the check in progress and the time left on a terminal."""
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{max(0.0, case.seconds_left()):.0f} s left", style="dim")

    console = make_console(file=terminal)
    columns = SpinnerColumn(), TextColumn("{task.description}"), Left()
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    with bar:
        row = bar.add_task("", total=None)
        yield Bar(lambda check: bar.update(row, description=check.code), bar.stop)
