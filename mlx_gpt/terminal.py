"""Text on its way to a terminal, which would obey the control characters in it.

A model can generate every byte, and a file's name or message can hold any character: escape sequences that clear the
screen, rename the window or write to the clipboard. ``escaped`` makes them visible, one character at a time, so that a
sequence split over two tokens is harmless too. Pipes and files receive the text unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]  # C0, DEL and C1, which some terminals take as ESC and a letter
REORDERING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # Unicode's bidirectional embeddings and overrides
ESCAPES = {code: repr(chr(code))[1:-1] for code in CONTROLS + REORDERING if chr(code) not in "\n\t"}

COMPILING = "MLX compiles kernels for this machine, which takes some seconds; the next run starts faster"


def escaped(text: str) -> str:
    r"""Return text with control characters written as Python does, ``\x1b``, except newlines and tabs.

    The carriage return of a line that ends with ``\r\n`` is removed.
    """
    return text.replace("\r\n", "\n").translate(ESCAPES)


def shown(text: str, stream: TextIO) -> str:
    """Return text ``escaped`` if the stream is a terminal, else unchanged."""
    return escaped(text) if stream.isatty() else text


def make_console(**options: Any) -> Console:
    """Return a console of rich that escapes the strings that it prints on a terminal."""
    from rich.console import Console, Text

    class EscapingConsole(Console):
        def render_str(self, text: str, **more: Any) -> Text:
            return super().render_str(escaped(text) if self.is_terminal else text, **more)

    return EscapingConsole(emoji=False, **options)
