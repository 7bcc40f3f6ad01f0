"""The command line, ``mlx-gpt COMMAND``: parsing and exit codes. The commands are in ``commands/``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from mlx_gpt.commands.convert import Convert
from mlx_gpt.commands.eval import Eval
from mlx_gpt.commands.export import Export
from mlx_gpt.commands.generate import Generate
from mlx_gpt.commands.prepare import Prepare
from mlx_gpt.commands.quickstart import Quickstart
from mlx_gpt.commands.serve import Serve
from mlx_gpt.commands.talk import Talk
from mlx_gpt.commands.train import Train, command_line
from mlx_gpt.commands.verify import Verify
from mlx_gpt.errors import MLXGPTError, UsageError

Command = Train | Generate | Talk | Serve | Prepare | Quickstart | Convert | Export | Verify | Eval


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line into a command with its settings. Raises ``SystemExit`` for --help and for wrong flags."""
    default: Any = tyro.MISSING
    if argv[:1] == ["train"]:
        flags, default = command_line(argv[1:])
        argv = ["train", *flags]
    description = "GPT-2 in MLX: train, load, generate, verify."
    flat: Any = Annotated[Command, OmitArgPrefixes, OmitSubcommandPrefixes]  # --top-k instead of --chance.top-k
    return tyro.cli(flat, prog="mlx-gpt", args=argv, default=default, description=description)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Return the exit code: 0, 1 for an error in files, network or data, 2 for wrong usage."""
    try:
        parse(list(sys.argv[1:] if argv is None else argv))()
        sys.stdout.flush()
    except MLXGPTError as error:
        return _fail(error, 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader has closed stdout, as after `| head -1`; Python would flush again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # a shell's exit code for SIGPIPE
    except OSError as error:  # such as a full disk or a read-only folder
        return _fail(f"{error.filename or 'the disk'}: {error.strerror or error}", 1)
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        if signum == signal.SIGINT:
            print(file=sys.stderr)  # after the ^C
        return _fail(str(stop) or "stopped", 128 + signum)
    return 0


def _fail(message: object, code: int) -> int:
    print(f"mlx-gpt: {message}", file=sys.stderr)
    return code
