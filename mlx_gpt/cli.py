"""One command, ``mlx-gpt``, a verb for each job. The verbs are in ``verbs/``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, subcommand

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

Verb = OmitArgPrefixes[
    Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Generate, subcommand("generate", prefix_name=False)]
    | Annotated[Talk, subcommand("talk", prefix_name=False)]
    | Annotated[Serve, subcommand("serve", prefix_name=False)]
    | Annotated[Prepare, subcommand("prepare", prefix_name=False)]
    | Annotated[Quickstart, subcommand("quickstart", prefix_name=False)]
    | Annotated[Convert, subcommand("convert", prefix_name=False)]
    | Annotated[Export, subcommand("export", prefix_name=False)]
    | Annotated[Verify, subcommand("verify", prefix_name=False)]
    | Annotated[Eval, subcommand("eval", prefix_name=False)]
]


def parse(
    argv: Sequence[str],
) -> Train | Generate | Talk | Serve | Prepare | Quickstart | Convert | Export | Verify | Eval:
    """The verb that a command line asks for, with all its settings. ``SystemExit`` after --help and for wrong flags."""
    default: Any = tyro.MISSING
    if argv[:1] == ["train"]:
        flags, default = command_line(argv[1:])
        argv = ["train", *flags]
    description = "GPT-2 in MLX: train it, load it, let it talk."
    return tyro.cli(Verb, prog="mlx-gpt", args=argv, default=default, description=description)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for what went wrong outside, 2 for wrong usage."""
    try:
        parse(list(sys.argv[1:] if argv is None else argv))()
        sys.stdout.flush()
    except UsageError as error:
        return _say(error, 2)
    except MLXGPTError as error:
        return _say(error, 1)
    except BrokenPipeError:  # nobody reads any more, as after `| head -1`; nor shall Python try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell says it: ended by SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written to
        return _say(f"{error.filename or 'the disk'}: {error.strerror or error}", 1)
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # behind the ^C
        return _say(str(stop) or "stopped", 128 + 2)
    return 0


def _say(trouble: object, code: int) -> int:
    print(f"mlx-gpt: {trouble}", file=sys.stderr)
    return code
