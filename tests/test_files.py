"""Files are written whole or not at all, and reach the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import environment
from helpers.small_training import new_small

from mlx_gpt import files
from mlx_gpt.errors import MLXGPTError
from mlx_gpt.files import atomic_path, atomic_write, fsync, is_vacant, sha256_of, unused
from mlx_gpt.store import folder
from mlx_gpt.text.tokenizer import Tokenizer


def test_text_and_bytes_replace_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    atomic_write(file, "one ü\r\n")
    assert file.read_bytes() == "one ü\r\n".encode()
    atomic_write(file, b"\0two")
    assert file.read_bytes() == b"\0two"
    assert [*tmp_path.iterdir()] == [file]


def test_a_folder_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    made, ordinary = tmp_path / "made", tmp_path / "ordinary"
    ordinary.mkdir()
    with atomic_path(made) as hidden:
        (hidden / "sub").mkdir(parents=True)
        (hidden / "sub" / "file").write_text("x")
        assert not made.exists()
    assert (made / "sub" / "file").read_text() == "x"
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe", "link to a link to a pipe", "link to itself"])
def test_only_a_file_is_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "pipe" in kind:
        os.mkfifo("pipe")
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind("socket")
    Path("link to a pipe").symlink_to("pipe")
    Path("link to a link to a pipe").symlink_to("link to a pipe")
    Path("link to itself").symlink_to("link to itself")
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
        atomic_write(Path(kind), "new")
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("exists", [True, False])
def test_of_a_link_the_target_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "folder").mkdir()
    if exists:
        (tmp_path / "folder/target").write_text("earlier")
    (tmp_path / "link").symlink_to("folder/target")
    atomic_write(tmp_path / "link", "later")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "folder/target").is_symlink()
    assert (tmp_path / "folder/target").read_text() == "later"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["target"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_replaces_no_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(MLXGPTError, match="not a regular file"):
        folder.save(new_small(), Tokenizer.bytes(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "interrupt"])
def test_a_failure_leaves_the_earlier_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "a.txt"
    atomic_write(file, "earlier")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt if step == "interrupt" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where: dict[str, tuple[Any, str]] = {"write": (Path, "write_bytes"), "fsync": (files, "fsync")}
    where |= {"replace": (os, "replace"), "interrupt": (Path, "write_bytes")}
    monkeypatch.setattr(*where[step], fail)
    with pytest.raises(KeyboardInterrupt if step == "interrupt" else OSError):
        atomic_write(file, "later")
    assert file.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [file]


def test_everything_is_flushed_before_the_name_appears_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace: Callable[..., None] = os.replace

    def record(source: Path, target: Path) -> None:
        events.append(f"-> {target.name}")
        replace(source, target)

    monkeypatch.setattr(files, "fsync", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", record)
    with atomic_path(tmp_path / "made") as hidden:
        hidden.mkdir()
        (hidden / "file").write_text("x")
    assert events == ["file", "made", "-> made", tmp_path.name]


@pytest.mark.parametrize("is_supported", [True, False])
def test_on_macos_the_drives_cache_is_flushed_where_the_file_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_supported: bool
) -> None:
    calls: list[str] = []

    def control(descriptor: int, command: int) -> None:
        assert (os.fstat(descriptor).st_ino, command) == (tmp_path.stat().st_ino, 51)
        calls.append("F_FULLFSYNC")
        if not is_supported:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    fsync(tmp_path)
    assert calls == (["F_FULLFSYNC"] if is_supported else ["F_FULLFSYNC", "fsync"])


HOLD = """
import sys, time
from pathlib import Path
from mlx_gpt.files import atomic_path
with atomic_path(Path(sys.argv[1])) as hidden:
    hidden.write_text("half")
    print(hidden.parent.name, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("save", ["file", "model"])
def test_a_save_removes_what_killed_saves_left_and_nothing_of_a_living_process(tmp_path: Path, save: str) -> None:
    mine = (".saving-notes", ".saving-ABCDEFGH", "saving-abcdefgh")  # not names of ours
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / ".saving-a_file00").write_text("a file")
    (tmp_path / ".saving-abcdefgh").mkdir()
    (tmp_path / ".saving-abcdefgh/model.safetensors").write_bytes(bytes(100))
    (tmp_path / ".saving-link0000").symlink_to(tmp_path / "saving-abcdefgh")

    def saved() -> None:
        if save == "model":
            folder.save(new_small(), Tokenizer.bytes(), tmp_path)
        else:
            atomic_write(tmp_path / "b.txt", "whole")

    command = [sys.executable, "-c", HOLD, str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout
        theirs = process.stdout.readline().strip()
        saved()
        kept = {path.name for path in tmp_path.iterdir() if "saving" in path.name}
        assert kept == {*mine, ".saving-a_file00", ".saving-link0000", theirs}
        process.kill()
    saved()
    assert {path.name for path in tmp_path.iterdir() if "saving" in path.name} == kept - {theirs}


def test_leftovers_are_kept_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    (tmp_path / ".saving-abcdefgh").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    atomic_write(tmp_path / "a.txt", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {".saving-abcdefgh", "a.txt"}


def test_a_folder_with_only_leftovers_is_vacant(tmp_path: Path) -> None:
    assert is_vacant(tmp_path / "new")
    assert is_vacant(tmp_path)
    (tmp_path / ".DS_Store").touch()
    assert is_vacant(tmp_path)
    (tmp_path / ".saving-abcdefgh").mkdir()
    (tmp_path / ".lock").touch()
    assert is_vacant(tmp_path)
    (tmp_path / ".hidden").touch()
    assert not is_vacant(tmp_path)
    assert not is_vacant(tmp_path / ".hidden")


def test_a_folder_replaces_one_with_only_a_ds_store(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.DS_Store").touch()
    with atomic_path(tmp_path / "new") as staging:
        staging.mkdir()
        (staging / "a").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    file, content = tmp_path / "a", os.urandom((1 << 20) + 3)
    file.write_bytes(content)
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()


def test_an_unused_path_gets_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert unused(tmp_path / "run") == tmp_path / "run-3"
    assert unused(tmp_path / "new") == tmp_path / "new"
