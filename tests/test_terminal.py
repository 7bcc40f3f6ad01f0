"""Control characters are escaped on a terminal and unchanged elsewhere."""

from __future__ import annotations

import io
import unicodedata

import pytest
from rich.table import Table

from mlx_gpt.terminal import escaped, make_console, shown

ATTACKS = {
    "title": "\x1b]0;PWNED\x07",
    "clear": "\x1b[2J\x1b[H",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "device control": "\x1bP+q544e\x9c",
    "8-bit CSI": "\x9b2J",
    "8-bit OSC": "\x9d0;PWNED\x9c",
    "overwritten line": "safe\rEVIL",
    "backspaces": "safe\b\b\b\bEVIL",
    "delete": "\x7f",
    "next line": "a\x85b",
    "override": "\u202egnp.exe",
    "isolate": "\u2067a\u2069",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_control_characters_become_visible(text: str) -> None:
    found = escaped(text)
    assert not {"Cc", "Cf"} & {unicodedata.category(c) for c in found}
    assert "".join(map(escaped, text)) == found  # however a sequence is split
    assert found.encode().decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["a\n\tb", "héllo 世界 🧑‍🚀 नमस्ते می‌خواهم", "\u00ad\u00a0\u200b\u200f\ufffd", r"\x1b"])
def test_other_text_is_unchanged(text: str) -> None:
    assert escaped(text) == text


def test_line_ends_of_windows_are_newlines() -> None:
    assert escaped("a\r\nb\r\n\rc") == "a\nb\n\\rc"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_only_a_terminal_gets_the_escaped_text(text: str) -> None:
    assert shown(text, io.StringIO()) == text
    assert shown(text, Terminal()) == escaped(text)


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_console_escapes_what_it_prints(text: str) -> None:
    screen = Terminal()
    console = make_console(
        file=screen, width=200, color_system=None, markup=False, highlight=False, force_terminal=True
    )
    console.print(text, style="cyan")
    table = Table(text, title=text)
    table.add_row(text)
    console.print(table)
    assert screen.getvalue().count(escaped(text)) == 4
    assert not set(screen.getvalue()) & set(text) & {"\x1b", "\x07", "\x7f", "\x9b", "\x9d", "\r", "\b", "\u202e"}
    pipe = io.StringIO()
    make_console(file=pipe).print("\x1b[2J :cat: ", markup=False)
    assert pipe.getvalue() == "\x1b[2J :cat: \n"
