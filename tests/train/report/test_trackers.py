"""Trackers receive every value of a row; one that cannot be used is refused before the run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TRAIN, everything, the_line

from mlx_gpt.cli import main
from mlx_gpt.errors import UsageError
from mlx_gpt.train.report.trackers import TRACKERS, open_tracker


def test_tensorboard_receives_every_value_of_a_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    tracker = open_tracker("tensorboard", tmp_path, {"steps": 2})
    tracker.row({"step": 1, "tokens": 8, "loss": 2.0, "val_loss": None})
    tracker.row({"step": 2, "tokens": 16, "val_loss": 1.5})
    tracker.close()
    assert scalars(tmp_path / "tensorboard") == [
        (1, "tokens", 8.0),
        (1, "loss", 2.0),
        (2, "tokens", 16.0),
        (2, "val_loss", 1.5),
    ]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of the event files in a folder: records of a length, its checksum, an event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
            at += 16 + length
    return found


def test_wandb_receives_every_value_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = open_tracker("wandb", tmp_path / "my-run", {"learning_rate": 0.5})
    tracker.row({"step": 1, "tokens": 8, "loss": 2.0})
    tracker.row({"step": 2, "tokens": 16, "loss": 1.75, "grad_norm": None})
    tracker.row({"step": 2, "tokens": 16, "val_loss": 1.5})
    tracker.close()
    (written,) = (tmp_path / "my-run" / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 20
    while len(logged(written)[2]) < 2 and time.monotonic() < end:  # another process writes it, also after close
        time.sleep(0.1)
    name, settings, rows = logged(written)
    assert (name, settings["learning_rate"]) == ("my-run", 0.5)
    assert rows == [{"_step": 1, "tokens": 8, "loss": 2.0}, {"_step": 2, "tokens": 16, "loss": 1.75, "val_loss": 1.5}]


def test_a_resumed_run_continues_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for folder in ("run", "run", "other"):
        tracker = open_tracker("wandb", tmp_path / folder, {})
        ids.append(wandb.run.id)
        tracker.close()
    assert ids[0] == ids[1] != ids[2]


def logged(file: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """A run's name, settings and rows, from its log: after 7 bytes, checksum (4), length (2), kind (1), a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    def values(items: Any) -> dict[str, Any]:
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    data, at, own = file.read_bytes(), 7, ("_timestamp", "_runtime")
    name, settings, rows = "", {}, []
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.HasField("run"):
            name = record.run.display_name
            settings |= values(record.run.config.update)
        elif record.HasField("history"):
            rows.append({key: value for key, value in values(record.history.item).items() if key not in own})
    return name, settings, rows


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs {package}.*pip install 'mlx-gpt\[{kind}\]'"):
        open_tracker(kind, tmp_path, {})


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--report-to must be one of tensorboard, wandb, not 'mlflow'"):
        open_tracker("mlflow", tmp_path, {})


def test_a_run_whose_tracker_is_refused_creates_no_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, flags = everything(here), [*TRAIN, "--learning-rate", "1e-3"]
    assert main([*flags, "--report-to", "mlflow"]) == 2
    assert "--report-to must be one of" in the_line(capsys.readouterr().err)
    assert everything(here) == before

    def refuse(*_: Any) -> None:
        raise UsageError("not logged in")

    monkeypatch.setitem(TRACKERS, "wandb", ("json", refuse))  # a package that is installed
    assert main([*flags, "--report-to", "wandb"]) == 2
    assert "not logged in" in capsys.readouterr().err
    assert main(flags) == 0
