"""``mlx-gpt talk``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gpt.commands.generation_flags import Flag, Speaker, legend, note, painted, say
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.settings import GenerationSettings

if TYPE_CHECKING:
    from mlx_gpt.generate.session import Session
    from mlx_gpt.generate.writer import Piece

HELP = """\
What you write is put at the end of the text, and the model goes on. Return alone: it goes on from where it is.
Ctrl-C stops it, or clears your line; Ctrl-D ends.

:again          take back what the model said last, and let it say something else
:undo           take back the last turn, yours and the model's
:new            begin a new text
:text           show all of the text
:settings       show every setting; mlx-gpt talk --help says what each means
:NAME VALUE     change one: :temperature 0.7, :top-p 0.9, :stop "." "!", :seed none
:quit           end, as Ctrl-D does
::WORDS         write words that begin with a colon"""
NONE = "none"
KEPT = 1000  # lines of history


@dataclass(frozen=True)
class Talk(Speaker):
    """Write a text together with a model: you begin, it goes on, you go on. :help tells how.

    Lines may come from a pipe, one for each turn.
    """

    colour: Flag = False
    """show how much each token surprised the model"""

    def __call__(self) -> None:
        given = GenerationSettings.of(
            self.length, self.constraints, self.drawing, self.speed, logprobs=0 if self.colour else None
        )
        from mlx_gpt.generate.session import Session

        model, tokenizer, draft = self.load()
        session = Session(model, tokenizer, given, draft)
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if at_terminal:
            note(f"{self.model} goes on with what you write; :help tells how, Ctrl-D ends")
            if self.colour:
                print(legend(), file=sys.stderr)
        with history() if at_terminal else nullcontext():
            for line in lines(at_terminal):
                if line.strip() == ":quit":
                    return
                try:
                    self._take(session, line)
                except UsageError as error:
                    note(str(error))

    def _take(self, session: Session, line: str) -> None:
        """Do what a line says."""
        if not line.startswith(":") or line.startswith("::"):
            return self._show(session, session.extend(line[line.startswith("::") :]))
        command, _, rest = line[1:].strip().partition(" ")
        if command == "again":
            return self._show(session, session.retry())
        if command == "undo":
            return session.undo()
        if command == "new":
            return session.clear()
        if command == "text":
            return say(session.text + "\n")
        if command == "settings":
            return say(table(session.settings))
        if command == "help":
            return say(HELP + "\n")
        session.settings = changed(session.settings, command, rest)
        return None

    def _show(self, session: Session, pieces: Generator[Piece, None, None]) -> None:
        from mlx_gpt.generate.writer import CONTEXT, END

        with closing(pieces):
            try:
                for piece in pieces:
                    say(painted(piece) if self.colour else piece.text)
            except KeyboardInterrupt:  # what has been said stays
                pass
        say("\n")
        if session.reason == CONTEXT:
            note("the model's context is full; :context slide goes on, :undo takes a turn back, :new begins anew")
        if session.reason == END:
            note("the model ended its text; :new begins another, and what you write goes on with this one")


def lines(at_terminal: bool) -> Iterator[str]:
    """What somebody writes, line by line, until the end: Ctrl-D, or that of a file."""
    if not at_terminal:
        for line in sys.stdin.buffer:
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                note("stdin: expected text in UTF-8; this line is left out")
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
    """Meanwhile the arrow keys bring earlier lines back, those of earlier sessions too."""
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    from mlx_gpt.files import cache_folder

    file: Path = cache_folder() / "talk_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(KEPT)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def changed(settings: GenerationSettings, name: str, value: str) -> GenerationSettings:
    """The settings with one of them given as text. ``UsageError`` for another name and for a value that cannot be."""
    name = name.replace("-", "_")
    usual = defaults()
    if name not in usual:
        raise UsageError(f":{name} is no command and no setting; :help and :settings tell which there are")
    try:
        return replace(settings, **{name: read(value.strip(), usual[name])})
    except UsageError:
        raise
    except ValueError:
        kind = "a number" if isinstance(usual[name], float) else "a whole number"
        expected = "ID BIAS, with more pairs behind it" if isinstance(usual[name], dict) else kind
        raise UsageError(f":{name.replace('_', '-')} takes {expected}, not {value.strip()!r}") from None


def read(text: str, usual: Any) -> Any:
    """A value as somebody writes it, of the kind of the usual one; ``ValueError`` where it is none."""
    if isinstance(usual, tuple):
        return () if text == NONE else tuple(shlex.split(text))
    if isinstance(usual, dict):
        pairs = [] if text == NONE else shlex.split(text)
        return {int(i): float(bias) for i, bias in zip(pairs[::2], pairs[1::2], strict=True)}
    if usual is None:
        return None if text == NONE else int(text)
    return type(usual)(text)


def defaults() -> dict[str, Any]:
    """Every setting that can be changed, and its usual value."""
    own = {
        field.name: field.default for field in fields(GenerationSettings) if field.name not in ("logprobs", "guesses")
    }
    return {name: {} if value is MISSING else value for name, value in own.items()}


def table(settings: GenerationSettings) -> str:
    """Every setting in a line, with its usual value where it has another."""
    rows = []
    for name, usual in defaults().items():
        value = getattr(settings, name)
        remark = "" if value == usual else f"  (usually {written(usual)})"
        rows.append(f":{name.replace('_', '-')} {written(value)}{remark}\n")
    return "".join(rows)


def written(value: Any) -> str:
    """A value as one would write it."""
    if isinstance(value, dict):
        value = tuple(f"{token_id} {bias}" for token_id, bias in value.items())
        return " ".join(value) or NONE
    if isinstance(value, tuple):
        return shlex.join(value) or NONE
    return NONE if value is None else str(value)
