"""One process at a time writes to a run's folder; a lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from helpers.command_line import environment

from mlx_gpt.errors import FolderInUseError, MLXGPTError
from mlx_gpt.store.run_lock import locked

HOLD = """
import sys
from pathlib import Path
from mlx_gpt.store.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder, until its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process
        if process.poll() is None:
            process.communicate()


def test_a_locked_folder_is_refused_with_its_process_host_and_time_and_unchanged(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        before = [(path, path.read_bytes()) for path in (tmp_path / "run").iterdir()]
        with pytest.raises(FolderInUseError) as error, locked(tmp_path / "run"):
            pass
        owner = rf"pid {process.pid} on {re.escape(platform.node())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(rf"\S+/run: another run writes to it \({owner}\); wait until it has .*", str(error.value))
        assert [(path, path.read_bytes()) for path in (tmp_path / "run").iterdir()] == before


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        with locked(tmp_path / "run"):
            assert f"pid {os.getpid()} on" in (tmp_path / "run/.lock").read_text()
    assert not any((tmp_path / "run").iterdir())


def test_a_folder_that_is_still_empty_is_removed_if_it_was_created(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "deep/run"), locked(tmp_path / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_thread_may_lock_again_what_it_holds_and_another_thread_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            with locked(tmp_path / "run"):
                pass
        except FolderInUseError as error:
            errors.append(error)

    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "run"):
        with locked(Path("run")):
            pass
        thread = Thread(target=attempt)
        thread.start()
        thread.join()
        assert (tmp_path / "run/.lock").exists()
    assert len(errors) == 1
    attempt()
    assert len(errors) == 1


def test_of_many_that_lock_and_release_at_once_one_at_a_time_has_it(tmp_path: Path) -> None:
    inside, seen, refused = [0], [], [0]

    def attempt() -> None:
        for _ in range(200):
            try:
                with locked(tmp_path / "run"):
                    inside[0] += 1
                    seen.append(inside[0])
                    inside[0] -= 1
            except FolderInUseError:
                refused[0] += 1

    threads = [Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {1}
    assert len(seen) + refused[0] == 800


def test_without_locks_of_the_file_system_the_run_begins_and_this_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    lines: list[str] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, lines.append):
        pass
    assert lines == [f"{tmp_path}: this file system has no locks; make sure that no other run writes to the folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "no permission", "no folders"])
def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    run = tmp_path / "run"
    if kind == "file":
        run.touch()
    else:
        run.mkdir()
    if kind == "folder":
        (run / ".lock").mkdir()
    if kind == "link":
        (run / ".lock").symlink_to(tmp_path / "elsewhere")
    if kind == "no permission":  # as root a mode would not do

        def refuse(*_: Any) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "open", refuse)
    if kind == "no folders":  # as /proc

        def missing(*_: Any) -> None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

        monkeypatch.setattr(os, "mkdir", missing)
        run = tmp_path / "new/run"
    with ExitStack() as stack, pytest.raises(MLXGPTError, match=r"run: cannot be written \(.*; a run needs a folder"):
        stack.enter_context(locked(run))
    assert not (tmp_path / "elsewhere").exists()
