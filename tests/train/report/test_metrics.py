"""Metrics are valid JSON lines on disk at once, a resumed run keeps those of its checkpoint, lines report them."""

from __future__ import annotations

import json
import os
import re
from io import StringIO
from math import inf, log, nan
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlx_gpt import files
from mlx_gpt.errors import MLXGPTError
from mlx_gpt.store.checkpoint import RunProgress
from mlx_gpt.train.report import metrics as report_module
from mlx_gpt.train.report.metrics import RunReport, bits_per_byte, truncate_metrics


def quiet() -> Console:
    return Console(file=StringIO())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parse_strictly(text: str) -> Any:
    """Parse standard JSON, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


# Rows


def test_a_row_is_written_to_disk_at_once(tmp_path: Path) -> None:
    report = RunReport(tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()
    report.row(step=1, tokens=8, loss=5.5)
    assert lines(tmp_path / "run") == [{"step": 1, "tokens": 8, "loss": 5.5}]
    report.close()


@pytest.mark.parametrize("value", [nan, inf, -inf, np.float32(nan), mx.array(inf)])
def test_nan_and_inf_become_null_in_valid_json(tmp_path: Path, value: Any) -> None:
    report = RunReport(tmp_path, quiet())
    report.row(step=1, loss=value)
    report.close()
    assert parse_strictly((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_numbers_of_numpy_and_mlx_are_written_as_numbers(tmp_path: Path) -> None:
    report = RunReport(tmp_path, quiet())
    report.row(step=np.int64(3), loss=np.float32(0.5), grad_norm=mx.array(2.0))
    report.close()
    assert lines(tmp_path) == [{"step": 3, "loss": 0.5, "grad_norm": 2.0}]


def test_a_loss_is_converted_to_bits_per_byte(tmp_path: Path) -> None:
    # Tokens of four bytes each, with a loss of four bits: 4 ln 2 nats.
    assert bits_per_byte(4 * log(2), tokens_per_byte=1 / 4) == pytest.approx(1.0)
    report = RunReport(tmp_path, quiet(), tokens_per_byte=1 / 4)
    report.row(step=1, loss=1.0)
    report.row(step=1, val_loss=4 * log(2))
    report.close()
    assert [row.get("bits_per_byte") for row in lines(tmp_path)] == [None, pytest.approx(1.0)]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = RunReport(None, quiet())
    report.row(step=1, loss=1.0)
    report.close()
    assert report.rows == [{"step": 1, "loss": 1.0}]
    assert not list(tmp_path.iterdir())


# Resuming


def write_rows(folder: Path, n: int) -> None:
    report = RunReport(folder, quiet())
    for step in range(1, n + 1):
        report.row(step=step, tokens=8 * step, loss=1 / step)
    report.close()


def progress(n: int) -> RunProgress:
    return RunProgress(step=n, tokens=8 * n, rows=n)


def never(text: str) -> None:
    raise AssertionError(text)


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_appends(tmp_path: Path) -> None:
    write_rows(tmp_path, 5)
    report = RunReport(tmp_path, quiet(), truncate_metrics(tmp_path, progress(3), never))
    report.row(step=4, loss=0.25)
    report.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4] == [row["step"] for row in report.rows]


def test_a_partial_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in truncate_metrics(tmp_path, progress(3), never)] == [1, 2, 3]
    assert len(lines(tmp_path)) == 3


def row(step: int, **values: Any) -> str:
    return json.dumps({"step": step, "tokens": 8 * step, **values})


@pytest.mark.parametrize(
    ("n", "content"),
    [
        (1, b"\xff\xfe\x00"),
        (1, b"[1]"),
        (1, b"{garbage"),
        (1, b'{"step": 1, "loss": 2.0}'),
        (1, b'{"step": true, "tokens": 8}'),
        (1, b'{"step": 1, "step": 2, "tokens": 8}'),
        (1, row(1, loss="x").encode()),
        (1, row(1, loss=nan).encode()),
        (1, row(1, loss=10**400).encode()),
        (1, b"9" * 5000),
        (1, b"[" * 20_000),
        (1, b" " * 70_000 + row(1).encode()),
        (1, b" " * 70_000),
        (2, f"{row(1)}\n\n{row(2)}".encode()),
        (2, f"{row(1, loss=2.0)}\n{row(1, loss=2.0)}".encode()),
        (3, f"{row(1)}\n{row(3)}\n{row(2)}".encode()),
        (2, f"{row(1)}\r\n{row(-2)}".encode()),
        (2, f"{row(1, loss=2.0)}\n{row(3, loss=2.0)}".encode()),  # a line is missing
        (1, row(2, loss=2.0).encode()),
        (2, f"{row(1, loss=2.0)}\n{row(2, val_loss=2.0)}".encode()),
    ],
    ids=lambda part: repr(part)[:40],
)
def test_anything_but_rows_of_metrics_is_refused_with_its_line_and_unchanged(
    n: int, content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content + b"\n" + row(9).encode() + b"\n")
    with pytest.raises(
        MLXGPTError, match=rf"jsonl: line {n}: expected a row of metrics, found .*; restore the file, or"
    ):
        truncate_metrics(tmp_path, progress(9), never)
    assert file.read_bytes().startswith(content)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_metrics_that_are_no_file_are_refused(kind: str, tmp_path: Path) -> None:
    (os.mkdir if kind == "folder" else os.mkfifo)(tmp_path / "metrics.jsonl")
    with pytest.raises(MLXGPTError, match=r"jsonl: expected the metrics of the run, but it cannot be read \("):
        truncate_metrics(tmp_path, progress(1), never)


@pytest.mark.parametrize(("n", "content"), [(0, None), (0, ""), (2, f"{row(1)}\n{row(2)}\n" + row(3)[:-4])])
def test_a_file_that_ends_early_is_reported_and_its_whole_rows_kept(
    n: int, content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    reports: list[str] = []
    found = [found["step"] for found in truncate_metrics(tmp_path, progress(3), reports.append)]
    assert found == [*range(1, n + 1), 3]  # the last marks the gap
    after = [found["step"] for found in truncate_metrics(tmp_path, RunProgress(step=3, rows=n + 1), never)]
    assert after == found
    assert reports == [f"{tmp_path}/metrics.jsonl: expected 3 rows, found {n}: those of earlier steps are lost"]
    assert len(lines(tmp_path)) == n + 1


@pytest.mark.parametrize("garbage", ["garbage\n", "garbage", "\n", "[1]\n", '{"step": 5, \n'])
def test_garbage_after_the_rows_of_the_checkpoint_is_reported_and_removed(garbage: str, tmp_path: Path) -> None:
    write_rows(tmp_path, 4)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(garbage)
    reports: list[str] = []
    truncate_metrics(tmp_path, progress(3), reports.append)
    assert reports == [
        f"{tmp_path}/metrics.jsonl: line 5: expected a row of metrics, found something else; it is removed"
    ]
    assert len(lines(tmp_path)) == 3


def test_a_line_deleted_before_the_rows_of_later_steps_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, 5)
    with pytest.raises(MLXGPTError, match=r"line 4: .*step 4 where the checkpoint is of step 3"):
        truncate_metrics(tmp_path, RunProgress(step=3, rows=4), never)


def test_a_failure_while_truncating_keeps_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, 5)

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        truncate_metrics(tmp_path, progress(3), never)
    assert len(lines(tmp_path)) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# Plain lines


def test_without_a_terminal_evaluations_are_plain_lines(tmp_path: Path) -> None:
    console = quiet()
    report = RunReport(tmp_path, console, tokens_per_byte=0.4)
    for step in range(1, 101):
        report.row(step=step, tokens=8 * step, loss=2.0, tokens_per_second=1000.0)
        report.progress(step / 100, 60.0)
    report.row(step=100, tokens=800, val_loss=2.5)
    report.evaluated(1.0, 0.0)
    report.close()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output == "100% · step 100 · loss 2.000 · validation 2.500 · 1.443 bits/byte · 1,000 tokens/s · 0:00 left\n"


def test_without_evaluations_a_line_is_printed_twice_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(report_module.time, "monotonic", lambda: now)
    console = quiet()
    report = RunReport(tmp_path, console)
    for step in range(1, 101):
        now += 1.0
        report.row(step=step, loss=2.0)
        report.progress(step / 100, 100.0 - step)
    report.close()
    output = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [int(re.findall(r"step (\d+)", line)[0]) for line in output] == [31, 62, 93]
