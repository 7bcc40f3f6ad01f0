"""``mlx-gpt doctor``: exit codes, what it refuses in one line, and what it leaves on the disk: nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import TRAIN, check_error, environment, everything, in_a_process, the_line

from mlx_gpt.cli import main
from mlx_gpt.text.tokenizer import Tokenizer

FORWARD = """
import numpy as np
print("loading")
W = np.random.default_rng(0).normal(size=(11, 11))
def forward(ids):
    print("computing")
    __import__("os").write(1, b"past Python")
    past = np.cumsum(W[ids], axis=1) / np.arange(1, ids.shape[1] + 1)[:, None]
    return np.tanh(past @ W + W[ids]) + np.arange(ids.shape[1])[:, None] * W[0] / 9
def build():
    return {"forward": forward, "vocab_size": 11, "n_positions": 16}
"""
FILES = {
    "sound.py": FORWARD,
    "leaks.py": FORWARD.replace("np.cumsum(W[ids], axis=1)", "np.cumsum(W[ids][:, ::-1], axis=1)[:, ::-1]"),
    "imports.py": "import numpy\n\nimport nothing_of_this_name\n",
    "syntax.py": "def build():\n    return {\n",
    "binary.py": b"\x00\x01\x02",
    "exits.py": "import sys\nsys.exit(0)\n",
    "missing.py": "def biuld(): pass\nbuild = 5\n",
    "nonsense.py": "def build(): return 5\n",
    "names.py": "def build(): return {'forwrd': abs}\n",
    "none.py": "def build(): return {'vocab_size': 5, 'n_positions': 8}\n",
    "raises.py": "def build():\n    print('trained')\n    return helper()\n\ndef helper():\n    return 1 / 0\n",
    "empty_ids.py": "def build(): return dict(forward=abs, vocab_size=5, n_positions=8, val_ids=[])\n",
    "cut.py": "def build(): return dict(forward=abs, vocab_size=5, n_positions=8, metrics='cut/metrics.jsonl')\n",
    "text.py": "def build(): return dict(forward=abs, vocab_size=5, n_positions=8, step='adam')\n",
    "blocks.py": FORWARD.replace('print("computing")', "import time; time.sleep(60)"),
    "never_returns.py": FORWARD.replace(
        'print("loading")',
        "import ctypes\nC = ctypes.CDLL(None)\n"
        "lock = ctypes.create_string_buffer(256)\nC.pthread_mutex_init(lock, None)",
    ).replace('print("computing")', "C.pthread_mutex_lock(lock)"),
    "empty.txt": "",
}
SUBJECTS = {
    "nothing": "nothing: expected the folder of a run or of a model, or FILE.py:FUNCTION; nothing has this name",
    "nothing.py:build": "nothing.py: expected a Python file, found none",
    "empty_folder": "empty_folder: expected config.json and model.safetensors, found neither",
    "tokenizer": "tokenizer: expected config.json and model.safetensors, found neither",
    "empty.txt": "empty.txt: expected a model folder or a file of weights",
    "pipe": "pipe: expected a model folder or a file of weights (safetensors, PyTorch's, llm.c's .bin, GGUF), found a "
    "device or a pipe",
    "pipe.py:build": "pipe.py: expected a Python file, found something else",
    "sound.py": "sound.py: expected a file and a function, such as sound.py:build",
    "imports.py:build": "imports.py:3: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "syntax.py:build": "syntax.py:",
    "binary.py:build": "binary.py",
    "exits.py:build": "exits.py:2: SystemExit: 0",
    "missing.py:build": "missing.py: build must be a function without arguments, not int",
    "missing.py:bild": "missing.py: has no function bild; did you mean biuld?",
    "nonsense.py:build": "nonsense.py:build: must return a dict of the arguments of examine(), ",
    "names.py:build": "names.py:build: returned 'forwrd', which examine() does not know; did you mean forward?",
    "none.py:build": "forward is missing",
    "raises.py:build": "raises.py:6: ZeroDivisionError: division by zero",
    "empty_ids.py:build": "val_ids is empty",
    "text.py:build": "step must be a function, not str 'adam'",
    "cut.py:build": "cut/metrics.jsonl: line 2 is cut off in the middle",
    "cut": "cut/metrics.jsonl: line 2 is cut off in the middle",
}
FLAGS = {
    "--data ''": ["--data", ""],
    "empty.txt": ["--data", "empty.txt"],
    "nothing.txt": ["--data", "nothing.txt"],
    "--minutes must be a number above 0, not 0": ["--minutes", "0"],
    "--minutes must be a number above 0, not nan": ["--minutes", "nan"],
    "--minutes must be a number above 0, not inf": ["--minutes", "inf"],
}


@pytest.fixture
def there(here: Path) -> Path:
    """A folder with subjects of every kind."""
    for name, content in FILES.items():
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("pipe", "pipe.py"):
        os.mkfifo(here / name)
    (here / "empty_folder").mkdir()
    Tokenizer.bytes().save(here / "tokenizer")
    (here / "cut").mkdir()
    for file in (here / "model").iterdir():
        (here / "cut" / file.name).write_bytes(file.read_bytes())
    (here / "cut/metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "lo')
    return here


def test_what_cannot_be_examined_is_refused_in_one_line_with_exit_code_2(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipe", "pipe.py"):
        (there / name).unlink()  # a snapshot would read it
    for subject, message in SUBJECTS.items():
        if not subject.startswith("pipe"):
            check_error(["doctor", subject], 2, message, there, capsys)
    for message, flags in FLAGS.items():
        check_error(["doctor", "model", *flags], 2, message, there, capsys)
    check_error(["doctor", "sound.py:build", "--data", "text.txt"], 2, "--data is for a folder", there, capsys)


@pytest.mark.parametrize("subject", ["pipe", "pipe.py:build"])
def test_a_pipe_is_refused_at_once(subject: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", subject]) == 2
    assert SUBJECTS[subject] in the_line(capsys.readouterr().err)


def test_the_exit_code_tells_a_fault_and_json_is_all_that_is_printed(there: Path) -> None:
    done = in_a_process("doctor", "leaks.py:build", "--json", "--minutes", "0.1", cwd=there)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [finding["code"] for finding in found["findings"]] == ["future-leak"]
    assert the_line(done.stderr) == "leaks.py:build: 1 fault, to repair first: future-leak"
    sound = in_a_process("doctor", "sound.py:build", "--minutes", "0.1", cwd=there)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.startswith("No fault was found.")
    blocked = in_a_process("doctor", "blocks.py:build", "--minutes", "0.01", cwd=there)
    assert blocked.returncode == 2
    assert the_line(blocked.stderr).startswith("blocks.py:build: nothing could be examined")
    assert "needs sample: " in sound.stdout
    assert not (there / "__pycache__").exists()


def test_a_call_that_never_returns_from_c_ends_with_the_report_so_far(there: Path) -> None:
    done = in_a_process("doctor", "never_returns.py:build", "--minutes", "0.02", cwd=there)
    assert "Warning: too-slow" in done.stdout
    assert "forward does not return, and could not be stopped" in done.stdout
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_the_check_and_the_time_left(there: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_gpt", "doctor", "sound.py:build", "--minutes", "0.1"]
    env = environment(TERM="xterm", COLUMNS="80")
    done = subprocess.Popen(command, cwd=there, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux: the other end is closed
        pass
    assert b" s left" in shown
    assert b"computing" not in shown
    assert done.communicate(timeout=60)[0].startswith("No fault was found.")


@pytest.mark.slow
def test_a_run_is_examined_with_its_text_its_step_and_its_metrics(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TRAIN, "--steps", "40", "--eval-every", "20", "--checkpoint-every", "20"]) == 0
    (here / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "temporary"))
    before = everything(here)
    capsys.readouterr()
    assert main(["doctor", "run", "--json", "--minutes", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    given = {f"needs {name}" for name in ("metrics", "batches", "val_ids", "train_text", "step", "reload")}
    assert not given & {*found["skipped"].values()}
    (here / "text.txt").write_text("".join(f"another {i * i}, " for i in range(900)))
    assert main(["doctor", "run", "--json", "--minutes", "0.01"]) == 0
    assert "text.txt has changed since the run" in capsys.readouterr().err
    (here / "text.txt").unlink()
    assert main(["doctor", "run", "--json", "--minutes", "0.01"]) == 0
    assert "the text of the run cannot be used" in (told := capsys.readouterr().err)
    assert "--data TEXT allows" in told
    (here / "run/model.safetensors").unlink()  # stopped before it had a best model
    assert main(["doctor", "run", "--json", "--minutes", "0.01"]) == 0
    (here / "text.txt").write_bytes(before["text.txt"])
    after = everything(here)
    assert after == {name: content for name, content in before.items() if name != "run/model.safetensors"}
