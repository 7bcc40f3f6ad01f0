"""The command line, ``mlx-gpt COMMAND``: parsing and exit codes. The commands are in ``commands/``."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from mlx_gpt.commands.bench import Bench
from mlx_gpt.commands.convert import Convert
from mlx_gpt.commands.doctor import Doctor
from mlx_gpt.commands.eval import Eval
from mlx_gpt.commands.export import Export
from mlx_gpt.commands.generate import Generate
from mlx_gpt.commands.given import given_settings
from mlx_gpt.commands.lens import Lens
from mlx_gpt.commands.prepare import Prepare
from mlx_gpt.commands.quickstart import Quickstart
from mlx_gpt.commands.serve import Serve
from mlx_gpt.commands.talk import Talk
from mlx_gpt.commands.train import Train, command_line
from mlx_gpt.commands.verify import Verify
from mlx_gpt.device import choose_device
from mlx_gpt.errors import MAX_LENGTH, MLXGPTError, UsageError, explained, one_line
from mlx_gpt.terminal import COMPILING
from mlx_gpt.text.pipes import with_names_of_pipes

Command = (
    Train | Generate | Talk | Serve | Prepare | Quickstart | Convert | Export | Verify | Eval | Lens | Doctor | Bench
)


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line into a command with its settings.

    Raises ``SystemExit`` for --help, and ``UsageError`` for wrong flags.
    """
    default: Any = tyro.MISSING
    if argv[:1] == ["train"]:
        flags, default = command_line(argv[1:])
        argv = ["train", *flags]
    for flags_of, name in ((Generate, "generate"), (Talk, "talk")):
        if argv[:1] == [name]:
            default = flags_of(model=tyro.MISSING, given=given_settings(argv))
    if list(argv) == ["--version"]:
        print(f"mlx-gpt {_version()}")
        raise SystemExit(0)
    description = "GPT-2 in MLX: train, load, generate, verify, look inside. --version prints the version."
    flat: Any = Annotated[Command, OmitArgPrefixes, OmitSubcommandPrefixes]  # --top-k instead of --chance.top-k
    options: Any = {"prog": "mlx-gpt", "default": default, "description": description}
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr), _wide_unless("--help" in argv or "-h" in argv):
            return tyro.cli(flat, args=argv, **options)
    except SystemExit as end:
        if end.code:
            raise UsageError(_without_box(stderr.getvalue())) from None
        raise


@contextmanager
def _wide_unless(help_is_shown: bool) -> Iterator[None]:
    """Let tyro print lines of any length, which it takes from COLUMNS, so that no word of an error is broken."""
    before = os.environ.get("COLUMNS")
    if not help_is_shown:
        os.environ["COLUMNS"] = str(2 * MAX_LENGTH)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ.update({} if before is None else {"COLUMNS": before})


def _without_box(error: str) -> str:
    """Return the error that tyro has printed in a box as one line: the first paragraph of each part, without help."""
    rows = [row[1:-1].rstrip() for row in error.splitlines()[1:-1]]  # between the sides of the box
    parts = [part.lstrip().partition("\n\n")[0].splitlines() for part in re.split(r"\n [─-]+\n", "\n".join(rows))]
    *shown, help_text = [" ".join(row.strip() for row in part if not row.startswith(" " * 9)) for part in parts]
    shown = [part.rstrip(".") for part in shown if not part.startswith("Argument helptext")]
    return "; ".join([*shown, f"see {help_text[help_text.find('mlx-gpt') :]}"]) if shown else error


def _version() -> str:
    try:
        return version("mlx-gpt")
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Return the exit code: 0, 1 for an error in files, network or data, 2 for wrong usage."""
    _open_closed_streams()
    try:
        command = parse(list(sys.argv[1:] if argv is None else argv))
        if not isinstance(
            command, Train | Quickstart | Bench
        ):  # equal texts alone and in a batch; figures to compare with
            os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 on M5 and CUDA; read at the first product
        _check_environment()
        choose_device()
        with _compilation_reported():
            command()
        sys.stdout.flush()
    except MLXGPTError as error:
        return _fail(with_names_of_pipes(str(error)), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader has closed stdout, as after `| head -1`
        return _fail(None, 128 + 13)  # a shell's exit code for SIGPIPE
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        if signum == signal.SIGINT:
            print(file=sys.stderr)  # after the ^C
        return _fail(str(stop) or "stopped", 128 + signum)
    except BaseException as error:
        if (line := explained(error)) is None:
            raise
        return _fail(line, 1)
    return 0


def _check_environment() -> None:
    """Refuse wrong switches, and report where MLX cannot compile, on Linux."""
    if sys.platform.startswith("linux"):
        from mlx_gpt.linux_cpu import check_environment

        if remark := check_environment():
            print(f"mlx-gpt: {one_line(remark)}", file=sys.stderr)


def _compilation_reported() -> AbstractContextManager[None]:
    """Report the compilation of kernels if it takes long, on Linux; on a Mac see ``device.first_reported``."""
    if not sys.platform.startswith("linux"):
        return nullcontext()
    from mlx_gpt.linux_cpu import compilation_reported

    return compilation_reported(lambda: print(f"mlx-gpt: {COMPILING}", file=sys.stderr, flush=True))


def _open_closed_streams() -> None:
    """Replace standard streams that the caller has closed, as by ``>&-``, by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _fail(message: object, code: int) -> int:
    """Print a line to stderr and return the exit code. What stdout no longer takes is dropped."""
    with suppress(OSError):
        if message is not None:
            print(f"mlx-gpt: {one_line(str(message))}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would flush again on exit, and fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
