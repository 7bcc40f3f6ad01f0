"""Checkpoints are restored to the bit; a damaged one is detected; a failed one leaves no trace."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import everything
from mlx.utils import tree_flatten

from mlx_gpt import files
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import CheckpointError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store import folder as folder_module
from mlx_gpt.store.checkpoint import (
    CheckpointManager,
    RunProgress,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    random_keys,
    restore_optimizer,
    restore_random_key,
    save_checkpoint,
)
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

SMALL = GPTConfig(vocab_size=257, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1)
IDS = np.random.default_rng(0).integers(0, 257, (2, 9), np.int32)
FILES = [
    "SHA256SUMS",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]


def trained(n: int = 3, kind: str = "muon") -> tuple[GPT, Any, Any]:
    """Return a model after n steps, its optimizer and its step."""
    mx.random.seed(0)
    model, optimizer = GPT(SMALL), make_optimizer(TrainConfig(optimizer=kind), SMALL.n_head)
    step = make_train_step(model, optimizer, TrainConfig(batch_size=2))
    losses(step, n)
    return model, optimizer, step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a run with the checkpoints of steps 3 and 4."""
    run = tmp_path_factory.mktemp("runs") / "run"
    for n in (3, 4):
        model, optimizer, _ = trained(n)
        save_checkpoint(run, model, Tokenizer.bytes(), optimizer, RunProgress(step=n, random=random_keys()))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in dict(tree_flatten(tree)).items()}


def same(one: Any, other: Any) -> bool:
    one, other = flat(one), flat(other)
    return one.keys() == other.keys() and all(
        (one[k] == other[k]).all() and one[k].dtype == other[k].dtype for k in one
    )


def never(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_is_restored_to_the_bit_and_so_is_the_next_step(tmp_path: Path, kind: str) -> None:
    model, optimizer, step = trained(3, kind)
    progress = RunProgress(3, 48, 3, 0.1, best_val_loss=1 / 3, best_step=2, stale=1, rows=4, random=random_keys())
    folder = save_checkpoint(tmp_path, model, Tokenizer.bytes(), optimizer, progress)
    weights, state = flat(model.parameters()), flat(optimizer.state)
    expected = losses(step)

    found = load_checkpoint(folder)
    assert same(found.model.parameters(), weights)
    assert same(found.optimizer, state)
    assert found.progress == progress
    assert found.tokenizer.hash == Tokenizer.bytes().hash

    fresh = make_optimizer(TrainConfig(optimizer=kind), SMALL.n_head)
    restore_optimizer(fresh, found.model, found.optimizer)
    restore_random_key(found.progress.random[0])
    assert losses(make_train_step(found.model, fresh, TrainConfig(batch_size=2))) == expected  # with the same dropout
    assert same(found.model.parameters(), model.parameters())


def losses(step_and_state: tuple[Any, Any], n: int = 2) -> list[float]:
    (step, state), found = step_and_state, []
    for _ in range(n):
        loss, _ = step(mx.array(IDS[:, :-1]), mx.array(IDS[:, 1:]))
        mx.eval(loss, state)
        found.append(loss.item())
    return found


def test_a_checkpoint_is_a_model_folder(run: Path) -> None:
    model, tokenizer = load(run / "checkpoints/step-4")
    assert same(model.parameters(), trained(4)[0].parameters())
    assert tokenizer.hash == Tokenizer.bytes().hash


def test_the_checksums_are_those_of_the_files(run: Path) -> None:
    folder = run / "checkpoints/step-4"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    expected = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in FILES[1:]]
    assert (folder / "SHA256SUMS").read_text().splitlines() == expected  # as sha256sum -c reads them


def test_the_last_k_checkpoints_are_kept(tmp_path: Path) -> None:
    model, optimizer, _ = trained(1)
    manager = CheckpointManager(tmp_path, Tokenizer.bytes(), keep=2)
    assert manager.newest() is None
    for n in (2, 9, 10, 100):  # sorted as numbers, not as text
        manager.save(model, optimizer, RunProgress(step=n))
        assert manager.newest() == tmp_path / f"checkpoints/step-{n}"
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-100", "step-10"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# Damage


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [missing, truncated, emptied, one_bit])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run / "checkpoints/step-4" / name)
    reports: list[str] = []
    assert newest_checkpoint(run, reports.append) == run / "checkpoints/step-3"
    (line,) = reports
    assert line.startswith(f"{run / 'checkpoints/step-4'}: ")
    assert line.endswith("; the one before it is used")
    assert name in line or name == "SHA256SUMS"


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.safetensors", "step-4"])
def test_a_pipe_or_a_file_in_place_of_a_checkpoint_does_not_hang(run: Path, name: str) -> None:
    folder = run / "checkpoints/step-4"
    reports: list[str] = []
    if name == "step-4":
        shutil.rmtree(folder)
        folder.touch()
    else:
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert newest_checkpoint(run, reports.append) == run / "checkpoints/step-3"
    assert len(reports) == 1


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"step": "4"}', '{"steps": 4}', '{"seconds": null}', '{"rows": -1}', '{"random": [[1]]}', "[" * 9_000],
)
def test_a_state_of_another_form_is_refused_in_one_line(run: Path, content: str) -> None:
    folder = run / "checkpoints/step-4"
    (folder / "progress.json").write_text(content)
    with pytest.raises(CheckpointError, match="saved by another version of mlx-gpt"):
        load_checkpoint(folder)
    (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: cannot be read"):
        load_checkpoint(folder)


def test_a_whole_checkpoint_is_used_without_a_message(run: Path) -> None:
    assert newest_checkpoint(run, never) == run / "checkpoints/step-4"


def test_if_all_are_damaged_the_error_says_how_to_start_again(run: Path) -> None:
    reports: list[str] = []
    for n in (3, 4):
        emptied(run / f"checkpoints/step-{n}/optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"found 2, all damaged; start again .*--config .*run\.toml --out NEW"):
        newest_checkpoint(run, reports.append)
    assert len(reports) == 2
    with pytest.raises(CheckpointError, match=r"expected a whole checkpoint in checkpoints/, found none"):
        newest_checkpoint(run.parent, never)


def test_the_leftovers_of_a_killed_process_are_removed(run: Path) -> None:
    for hidden in (".saving-abcdefgh/step-5", ".removed-12345678"):
        shutil.copytree(run / "checkpoints/step-4", run / "checkpoints" / hidden)
    assert newest_checkpoint(run, never) == run / "checkpoints/step-4"
    model, optimizer, _ = trained(1)
    save_checkpoint(run, model, Tokenizer.bytes(), optimizer, RunProgress(step=6))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(run: Path) -> None:
    emptied(run / "checkpoints/step-4/model.safetensors")
    model, optimizer, _ = trained(4)
    save_checkpoint(run, model, Tokenizer.bytes(), optimizer, RunProgress(step=4))
    assert newest_checkpoint(run, never) == run / "checkpoints/step-4"


def test_the_state_of_another_optimizer_is_refused(run: Path) -> None:
    found = load_checkpoint(run / "checkpoints/step-4")
    with pytest.raises(CheckpointError, match="another optimizer or model"):
        restore_optimizer(make_optimizer(TrainConfig(), 2), found.model, found.optimizer)
    with pytest.raises(CheckpointError, match="another optimizer or model"):
        restore_optimizer(
            make_optimizer(TrainConfig(optimizer="muon"), 2), GPT(replace(SMALL, n_embd=16)), found.optimizer
        )


# Failed writes


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_for(name: str, replace: Callable[..., None]) -> Callable[..., None]:
    return lambda source, target: no_room() if Path(target).name == name else replace(source, target)


def cut_short(write: Callable[..., None], name: str) -> Callable[..., None]:
    def cut(file: str | Path, *arguments: Any, **options: Any) -> None:
        write(file, *arguments, **options)
        if Path(file).name == name:
            truncated(Path(file))  # a full disk without an error

    return cut


@pytest.mark.parametrize(
    ("where", "what", "fails"),
    [
        (folder_module, "write_safetensors", lambda: no_room),
        (folder_module, "write_safetensors", lambda: cut_short(folder_module.write_safetensors, "model.safetensors")),
        (mx, "save_safetensors", lambda: cut_short(mx.save_safetensors, "optimizer.safetensors")),
        (files, "fsync", lambda: no_room),
        (os, "replace", lambda: no_room_for("step-5", os.replace)),
        (Path, "write_text", lambda: no_room),
        (Path, "mkdir", lambda: no_room),
    ],
    ids=["weights", "weights cut short", "optimizer cut short", "fsync", "rename", "text", "folder"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_as_they_were(
    run: Path, monkeypatch: pytest.MonkeyPatch, where: Any, what: str, fails: Callable[[], Callable[..., None]]
) -> None:
    before = everything(run)
    model, optimizer, _ = trained(1)
    monkeypatch.setattr(where, what, fails())
    with pytest.raises(CheckpointError) as e:
        save_checkpoint(run, model, Tokenizer.bytes(), optimizer, RunProgress(step=5))
    monkeypatch.undo()
    assert "step-5 could not be saved (" in str(e.value)
    assert str(e.value).endswith(f"make room, then resume with: mlx-gpt train --resume {run}")
    assert "\n" not in str(e.value)
    assert everything(run) == before
    assert not list((run / "checkpoints").glob(".*"))


def test_every_file_is_flushed_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def forced(path: Path) -> None:
        events.append(path.name)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(files, "fsync", forced)
    monkeypatch.setattr(folder_module, "fsync", forced)
    monkeypatch.setattr(os, "replace", renamed)
    model, optimizer, _ = trained(1)
    save_checkpoint(tmp_path, model, Tokenizer.bytes(), optimizer, RunProgress(step=1))
    named = events.index("-> step-1")
    assert {*FILES} <= {*events[:named]}
    assert events[named + 1 :] == ["checkpoints"]  # and then the name
