"""``mlx-gpt talk``: the text grows turn by turn, turns can be taken back, and settings changed on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.command_line import SMALL, environment

from mlx_gpt.cli import main
from mlx_gpt.commands.talk import HELP, LIBEDIT, changed, defaults, history_lines, written
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import LOOKUP, generate_tokens
from mlx_gpt.generate.session import Session, with_space
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.speculative import common_prefix
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
GREEDY = GenerationSettings(temperature=0, max_tokens=5)


@pytest.fixture(scope="module")
def model() -> GPT:
    mx.random.seed(0)
    return GPT(SMALL).eval()


def generated(model: GPT, ids: list[int], settings: GenerationSettings = GREEDY, **more: Any) -> list[int]:
    """Return the continuation of the whole text."""
    return list(generate_tokens(model, TOKENIZER, ids, **(vars(settings) | more)))


def turn(session: Session, words: str = "") -> str:
    return "".join(piece.text for piece in session.extend(words))


# The session


@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.parametrize("draft", [None, LOOKUP])
def test_a_turn_equals_generation_from_the_whole_text(model: GPT, bits: int | None, draft: str | None) -> None:
    settings = GenerationSettings(temperature=0, max_tokens=5, cache_bits=bits)
    session, ids = Session(model, TOKENIZER, settings, draft), []
    for words in ("ab", "", "c", "", "de"):
        ids += TOKENIZER.encode(with_space(TOKENIZER.decode(ids), words))
        ids += generated(model, ids, settings)
        turn(session, words)
        assert session.ids == ids
    assert session.text == TOKENIZER.decode(ids)


def test_a_turn_reads_its_own_tokens_only(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    session, lengths, hidden = Session(model, TOKENIZER, GREEDY), [], GPT.hidden

    def spy(self: GPT, tokens: mx.array, cache: Any = None) -> mx.array:
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, cache)

    monkeypatch.setattr(GPT, "hidden", spy)
    turn(session, "ten bytes.")
    turn(session, "three")
    list(session.retry())
    assert [n for n in lengths if n > 1] == [10, len(" three") + 1]  # the last generated token is not read yet


def test_turns_can_be_undone_and_continuations_replaced(model: GPT) -> None:
    session = Session(model, TOKENIZER, GenerationSettings(temperature=1.0, max_tokens=8, seed=1))
    first = turn(session, "ab")
    second = turn(session, "cd")
    before = session.text
    third = "".join(piece.text for piece in session.retry())
    assert third != second
    assert session.text == before.removesuffix(second) + third
    session.undo()
    assert session.text == "ab" + first
    session.undo()
    assert session.text == ""
    with pytest.raises(UsageError, match="no turn to undo"):
        session.undo()
    with pytest.raises(UsageError, match="no text to continue"):
        session.retry()


def test_the_same_turns_give_the_same_text(model: GPT) -> None:
    texts = []
    for seed in (1, 1, 2):
        session = Session(model, TOKENIZER, GenerationSettings(temperature=1.0, max_tokens=8, seed=seed))
        turn(session, "ab")
        turn(session)
        list(session.retry())
        texts.append(session.text)
    assert texts[0] == texts[1] != texts[2]


def test_a_text_cut_by_a_stop_string_continues_from_the_shown_part(model: GPT) -> None:
    tokenizer = Tokenizer.train(["the cat sat. the cat ran. the dog sat.\n\n"] * 9, 270)
    token = next(token for token in tokenizer.ranks if len(token) > 2)
    start, stop = token[:1].decode(), token[1:].decode()
    mx.random.seed(0)
    config = SMALL.__class__(**(vars(SMALL) | {"vocab_size": 270}))
    settings = GenerationSettings(
        temperature=0, max_tokens=5, stop=(stop,), logit_bias={tokenizer.ranks[token]: 1000.0}
    )
    session = Session(GPT(config).eval(), tokenizer, settings)
    for n in (1, 2):
        assert turn(session) == start
        assert session.reason == "stop"
        assert session.text == start * n


def test_a_refused_turn_leaves_the_text_unchanged(model: GPT) -> None:
    session = Session(model, TOKENIZER, GREEDY)
    turn(session, "ab")
    before = list(session.ids)
    with pytest.raises(UsageError, match=r"the text is 4\d tokens long and the model's context is 32; let it slide"):
        session.extend("c" * 34)
    assert session.ids == before
    session.settings = GenerationSettings(temperature=0, max_tokens=5, context="slide")
    turn(session, "c" * 34)
    whole = session.ids[:-5]
    assert session.ids == whole + generated(model, whole[-16:])
    turn(session)
    assert session.ids[:-5] + generated(model, session.ids[-21:-5]) == session.ids


def test_an_interrupted_text_is_kept_and_continued(model: GPT) -> None:
    session = Session(model, TOKENIZER, GREEDY)
    pieces = session.extend("ab")
    shown = next(pieces).text + next(pieces).text
    pieces.close()
    assert len(session.ids) == 4
    assert session.text.startswith("ab" + shown)
    ids = list(session.ids)
    turn(session, "x")
    assert session.ids == ids + TOKENIZER.encode(with_space(TOKENIZER.decode(ids), "x")) + session.ids[-5:]
    assert session.ids[-5:] == generated(model, session.ids[:-5])


def test_a_word_is_separated_from_the_text_by_a_space() -> None:
    assert [with_space(text, "went") for text in ("", "Lily", "Lily ", "Lily\n")] == ["went", " went", "went", "went"]
    assert [with_space("Lily", words) for words in (", too", " went", "", "去")] == [", too", " went", "", "去"]
    assert [common_prefix([1, 2, 3], ids) for ids in ([], [1, 2], [1, 2, 3, 4], [1, 9], [9])] == [0, 2, 3, 1, 0]


# The settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("temperature 0.5", {"temperature": 0.5}),
        ("top-p .9", {"top_p": 0.9}),
        ("top_k 3", {"top_k": 3}),
        ("max-tokens 7", {"max_tokens": 7}),
        ("context slide", {"context": "slide"}),
        ("seed 3", {"seed": 3}),
        ("seed none", {"seed": None}),
        ("stop '. ' end", {"stop": (". ", "end")}),
        ("stop none", {"stop": ()}),
        ("logit-bias 3 -inf 4 1.5", {"logit_bias": {3: float("-inf"), 4: 1.5}}),
    ],
)
def test_a_setting_is_changed_by_a_line(line: str, expected: dict[str, Any]) -> None:
    name, _, value = line.partition(" ")
    before = GenerationSettings(seed=9, stop=("x",))
    assert vars(changed(before, name, value)) == vars(before) | expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temperature hot", ":temperature takes a number, not 'hot'"),
        ("temperature -1", ":temperature must be 0 (greedy) or above"),
        ("max-tokens 1.5", ":max-tokens takes a whole number, not '1.5'"),
        ("seed x", ":seed takes a whole number, not 'x'"),
        ("logit-bias 3", ":logit-bias takes pairs ID BIAS, not '3'"),
        ("stop 'a", ":stop takes"),
        ("stop ''", ":stop must be texts of at least one character"),
        ("walk 3", ":walk is neither a command nor a setting"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(line: str, message: str) -> None:
    name, _, value = line.partition(" ")
    with pytest.raises(UsageError) as error:
        changed(GenerationSettings(), name, value)
    assert message in str(error.value)


def test_a_setting_can_be_given_as_it_is_shown() -> None:
    some = GenerationSettings(seed=9, stop=("a b", "'"), logit_bias={3: float("-inf")}, top_p=0.5)
    again = GenerationSettings()
    for name in defaults():
        again = changed(again, name, written(getattr(some, name)))
    assert again == some


# The command


def talked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: bytes) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    assert main(["talk", "model", "--max-tokens", "5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    return out, err


def test_lines_of_a_pipe_are_turns(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(*load("model"), GREEDY)
    first, second = turn(session, "ab"), turn(session, ":c")
    out, err = talked(monkeypatch, capsys, b"ab", b"::c", b":text", b":undo", b":text", b":new", b":text")
    assert out == f"{first}\n{second}\nab{first}:c{second}\nab{first}\n\n"
    assert err == ""


def test_commands_may_come_from_a_pipe(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talked(monkeypatch, capsys, b":help", b":max-tokens 3", b":settings", b":quit", b"never read")
    assert out.startswith(HELP)
    assert ":max-tokens 3  (default 200)\n" in out
    assert ":temperature 0.0  (default 0.8)\n" in out
    assert out.endswith(":cache-bits none\n")
    assert err == ""


def test_errors_do_not_end_a_session(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [b":undo", b":again", b":walk", b":top-p 2", b"caf\xe9", b"x" * 40]
    out, err = talked(monkeypatch, capsys, *wrong, b"ab", b":text")
    assert err.splitlines() == [
        "mlx-gpt: there is no turn to undo",
        "mlx-gpt: there is no text to continue; write some, or press return",
        "mlx-gpt: :walk is neither a command nor a setting; :help and :settings list them",
        "mlx-gpt: :top-p must be above 0 and at most 1 (off), not 2.0",
        "mlx-gpt: stdin: expected text in UTF-8; this line is skipped",
        "mlx-gpt: the text is 40 tokens long and the model's context is 32; let it slide (:context slide), undo a turn "
        "(:undo) or start a new text (:new)",
    ]
    text = turn(Session(*load("model"), GREEDY), "ab")
    assert out == f"{text}\nab{text}\n"


def test_a_full_context_is_reported_and_may_slide(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = talked(monkeypatch, capsys, b":max-tokens 40", b":min-tokens 40", b"ab", b":context slide", b"", b":text")
    assert err.splitlines() == [
        "mlx-gpt: the model's context is full; :context slide continues, :undo removes a turn, :new starts a new text"
    ]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_at_a_terminal_ctrl_c_stops_the_text_and_ctrl_d_ends_the_session(here: Path) -> None:
    ours, theirs = os.openpty()
    flags = ["--max-tokens", "100000", "--context", "slide", "--min-tokens", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_gpt", "talk", "model", *flags],
        cwd=here,
        env=environment(TERM="dumb", XDG_CACHE_HOME=str(here / "cache")),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        seen = ""

        def until(text: str) -> None:
            nonlocal seen
            deadline = time.monotonic() + 60
            while text not in seen:
                if time.monotonic() > deadline:
                    process.kill()  # which talks on otherwise, and is waited for
                    pytest.fail(seen[-500:])
                seen += os.read(ours, 4096).decode("utf-8", "replace")
            seen = seen[seen.index(text) + len(text) :]

        until("> ")
        os.write(ours, b"once\r")
        until("once")
        # It talks, and would for minutes. Before it does, MLX may run g++ --version by system(), which drops Ctrl-C.
        while len(seen) < 400:
            seen += os.read(ours, 4096).decode("utf-8", "replace")
        process.send_signal(signal.SIGINT)
        until("\n> ")
        os.write(ours, b":max-tokens 1\r")
        until("> ")
        os.write(ours, b":min-tokens 0\r")
        until("> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    os.close(ours)
    assert (here / "cache/mlx_gpt/talk_history").read_text().splitlines()[-3:] == [
        "once",
        ":max-tokens 1",
        ":min-tokens 0",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a plain line\n\\040 as it is\n", ["a plain line", "\\040 as it is"]),
        (f"{LIBEDIT}\na\\040line\\011of\\\\040libedit\nÄ\\040b\n", ["a line\tof\\040libedit", "Ä b"]),
        (f"{LIBEDIT}\n", []),
    ],
)
def test_the_history_of_gnu_readline_and_of_libedit_is_read(text: str, lines: list[str]) -> None:
    assert history_lines(text) == lines


WRITE = """
import ctypes, sys
library, file, *lines = sys.argv[1:]
edit = ctypes.CDLL(library)
edit.using_history()
for line in lines:
    edit.add_history(line.encode())
sys.exit(edit.write_history(file.encode()))
"""


@pytest.mark.skipif(find_library("edit") is None, reason="no libedit")
def test_the_history_that_libedit_writes_is_read(tmp_path: Path) -> None:
    lines = ["a line\tof\\040libedit", "\\", "plain"]
    command = [sys.executable, "-c", WRITE, str(find_library("edit")), str(tmp_path / "history"), *lines]
    subprocess.run(command, check=True)
    text = (tmp_path / "history").read_text()
    assert text.startswith(f"{LIBEDIT}\na\\040line\\011of\\")
    assert history_lines(text) == lines
