"""``mlx-gpt talk``."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gpt.commands.generation_flags import (
    Flag,
    GenerationFlags,
    legend,
    note,
    surprise_style,
    watched,
    write,
)
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.settings import GenerationSettings

if TYPE_CHECKING:
    from mlx_gpt.generate.session import Session
    from mlx_gpt.generate.writer import Piece

HELP = """\
Your line is appended to the text, and the model continues it; Return alone continues the text as it is.
Ctrl-C stops the model, or clears your line; Ctrl-D ends.

:again          replace the model's last continuation by another
:undo           remove the last turn, yours and the model's
:new            start a new text
:text           show the whole text
:settings       show every setting; mlx-gpt talk --help explains them
:NAME VALUE     change one: :temperature 0.7, :top-p 0.9, :stop "." "!", :seed none
:quit           end, like Ctrl-D
::WORDS         write words that begin with a colon"""
NONE = "none"
MAX_HISTORY = 1000  # lines
LIBEDIT = "_HiStOrY_V2_"  # the first line of a history file of libedit (history.c)


@dataclass(frozen=True)
class Talk(GenerationFlags):
    """Write a text in turns with a model; :help lists the commands.

    Lines may come from a pipe, one per turn.
    """

    colour: Flag = False
    """colour each token by its surprise"""

    def __call__(self) -> None:
        given = GenerationSettings.of(
            self.length, self.constraints, self.drawing, self.speed, logprobs=0 if self.colour else None
        )
        from mlx_gpt.generate.memory import memory_limits
        from mlx_gpt.generate.session import Session

        model, tokenizer, draft = self.load()
        session = Session(model, tokenizer, given, draft)
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if at_terminal:
            note(f"{self.model} continues what you write; :help lists the commands, Ctrl-D ends")
            if self.colour:
                print(legend(), file=sys.stderr)
        with history() if at_terminal else nullcontext(), memory_limits(model):
            for line in lines(at_terminal):
                if line.strip() == ":quit":
                    return
                try:
                    self._take(session, line)
                except UsageError as error:
                    note(str(error))

    def _take(self, session: Session, line: str) -> None:
        """Run a command or take a turn."""
        if not line.startswith(":") or line.startswith("::"):
            self._show(session, session.extend(line[line.startswith("::") :]))
            return
        name, _, value = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[], None]] = {
            "again": lambda: self._show(session, session.retry()),
            "undo": session.undo,
            "new": session.clear,
            "text": lambda: write(session.text + "\n"),
            "settings": lambda: write(table(session.settings)),
            "help": lambda: write(HELP + "\n"),
        }
        if name in commands:
            commands[name]()
        else:
            session.settings = changed(session.settings, name, value)

    def _show(self, session: Session, pieces: Generator[Piece, None, None]) -> None:
        from mlx_gpt.generate.writer import CONTEXT, END

        with closing(pieces), suppress(KeyboardInterrupt):  # the text so far stays
            for piece in watched(pieces):
                write(piece.text, surprise_style(piece) if self.colour else "")
        write("\n")
        if session.reason == CONTEXT:
            note("the model's context is full; :context slide continues, :undo removes a turn, :new starts a new text")
        if session.reason == END:
            note("the model ended its text; :new starts another, and a line continues this one")


def lines(at_terminal: bool) -> Iterator[str]:
    """Yield the user's lines until Ctrl-D or the end of a file."""
    if not at_terminal:
        for line in sys.stdin.buffer:
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                note("stdin: expected text in UTF-8; this line is skipped")
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


@contextmanager
def history() -> Iterator[None]:
    """Let the arrow keys recall earlier lines, also of earlier sessions."""
    try:
        import readline
    except ImportError:
        yield
        return
    from mlx_gpt.files import atomic_write, cache_folder

    file: Path = cache_folder() / "talk_history"
    with suppress(OSError):
        for line in history_lines(file.read_text("utf-8", errors="replace")):
            readline.add_history(line)
    try:
        yield
    finally:
        # Plain lines, since GNU readline and libedit, which macOS has, cannot read each other's files.
        length = readline.get_current_history_length()
        items = [readline.get_history_item(i) or "" for i in range(max(length - MAX_HISTORY, 0) + 1, length + 1)]
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, "".join(f"{item}\n" for item in items))


def history_lines(text: str) -> list[str]:
    """Return the lines of a history file: plain ones, or those of libedit, with its escapes of white space read."""
    lines = [line for line in text.split("\n") if line]
    if lines[:1] != [LIBEDIT]:
        return lines
    return [
        re.sub(r"\\([0-7]{3}|\\)", lambda m: "\\" if m[1] == "\\" else chr(int(m[1], 8)), line) for line in lines[1:]
    ]


def changed(settings: GenerationSettings, name: str, value: str) -> GenerationSettings:
    """Return the settings with one changed to a value given as text. Raises ``UsageError``."""
    name = name.replace("-", "_")
    all_defaults = defaults()
    if name not in all_defaults:
        raise UsageError(f":{name} is neither a command nor a setting; :help and :settings list them")
    try:
        new = parsed(value.strip(), all_defaults[name])
    except ValueError:
        kind = "a number" if isinstance(all_defaults[name], float) else "a whole number"
        expected = "pairs ID BIAS" if isinstance(all_defaults[name], dict) else kind
        raise UsageError(f":{name.replace('_', '-')} takes {expected}, not {value.strip()!r}") from None
    try:
        return replace(settings, **{name: new})
    except UsageError as error:
        raise UsageError(f":{error}") from None


def parsed(text: str, default: Any) -> Any:
    """Parse a value of the type of the default; ``ValueError`` if it is not one."""
    if isinstance(default, tuple):
        return () if text == NONE else tuple(shlex.split(text))
    if isinstance(default, dict):
        pairs = [] if text == NONE else shlex.split(text)
        return {int(i): float(bias) for i, bias in zip(pairs[::2], pairs[1::2], strict=True)}
    if default is None:
        return None if text == NONE else int(text)
    return type(default)(text)


def defaults() -> dict[str, Any]:
    """Return every setting that can be changed, with its default."""
    fixed = ("logprobs", "guesses", "stop_token_ids", "ignore_eos")  # of other commands
    return {name: value for name, value in vars(GenerationSettings()).items() if name not in fixed}


def table(settings: GenerationSettings) -> str:
    """Return a line per setting, with its default if it differs."""
    rows = []
    for name, default in defaults().items():
        value = getattr(settings, name)
        remark = "" if value == default else f"  (default {written(default)})"
        rows.append(f":{name.replace('_', '-')} {written(value)}{remark}\n")
    return "".join(rows)


def written(value: Any) -> str:
    """Return a value in the form that ``parsed`` reads."""
    if isinstance(value, dict):
        value = tuple(f"{token_id} {bias}" for token_id, bias in value.items())
        return " ".join(value) or NONE
    if isinstance(value, tuple):
        return shlex.join(value) or NONE
    return NONE if value is None else str(value)
