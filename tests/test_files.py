"""Files are written whole or not at all, and reach the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt import files
from mlx_gpt.files import atomic_path, atomic_write, fsync, sha256_of, unused


def test_text_and_bytes_replace_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    atomic_write(file, "one ü\r\n")
    assert file.read_bytes() == "one ü\r\n".encode()
    atomic_write(file, b"\0two")
    assert file.read_bytes() == b"\0two"
    assert [*tmp_path.iterdir()] == [file]


def test_a_folder_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    folder, ordinary = tmp_path / "made", tmp_path / "ordinary"
    ordinary.mkdir()
    with atomic_path(folder) as hidden:
        (hidden / "sub").mkdir(parents=True)
        (hidden / "sub" / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "sub" / "file").read_text() == "x"
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


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


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    file, content = tmp_path / "a", os.urandom((1 << 20) + 3)
    file.write_bytes(content)
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()


def test_an_unused_path_gets_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert unused(tmp_path / "run") == tmp_path / "run-3"
    assert unused(tmp_path / "new") == tmp_path / "new"
