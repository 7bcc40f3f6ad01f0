"""Metrics are valid JSON, the live panel delays no step, and lines, plot and trackers show every number."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from io import StringIO
from math import inf, log, nan
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import TRAIN, everything, the_line
from rich.console import Console

from mlx_gpt import files
from mlx_gpt.cli import main
from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.store.checkpoint import RunProgress
from mlx_gpt.train.report import metrics as report_module
from mlx_gpt.train.report.metrics import RunReport, bits_per_byte, truncate_metrics
from mlx_gpt.train.report.panel import REFRESH_RATE, Curve, LivePanel, sparkline
from mlx_gpt.train.report.plot import plot_loss, prepare_fonts, running_mean
from mlx_gpt.train.report.trackers import TRACKERS, open_tracker
from mlx_gpt.train.units import format_large, format_time

MEASURED = {
    "step": 1240,
    "tokens": 2_539_520,
    "loss": 1.6123,
    "val_loss": 1.7012,
    "bits_per_byte": 1.0211,
    "learning_rate": 8.3e-4,
    "grad_norm": 0.4182,
    "tokens_per_second": 12_345.6,
    "peak_memory_bytes": 1_234_567_890,
}


def quiet() -> Console:
    return Console(file=StringIO())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parse_strictly(text: str) -> Any:
    """Parse standard JSON, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def drawn(panel: LivePanel, width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(panel)
    return capture.get().splitlines()


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


# The panel


def test_the_panel_shows_every_value_of_the_newest_rows() -> None:
    panel = LivePanel(matrix_tokens_per_second=190e9 / 6e6)
    panel.latest, panel.done, panel.seconds_left = MEASURED, 0.62, 192.0
    panel.curve.add(1.6)
    shown = "\n".join(drawn(panel, 80))
    numbers = ["62%", "1,240", "3:12", "1.6123", "1.7012", "1.0211", "8.30e-04", "0.418", "12,346", "2.54 M", "1.23 GB"]
    assert not [number for number in numbers if number not in shown]
    assert re.search(r"of matrix speed +39%", shown)  # 12,345.6 tokens/s x 6 MFLOP of 190 GFLOP/s


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_the_panel_fits_its_terminal_and_truncates_no_value(width: int) -> None:
    panel = LivePanel(190e9 / 6e6)
    panel.latest = MEASURED
    for step in range(300):
        panel.curve.add(5 - step / 100)
    rows = drawn(panel, width)
    assert max(map(len, rows)) <= min(width, 96)
    if width >= 40:
        assert "1.7012" in "\n".join(rows)
        assert "…" not in "\n".join(rows)


def test_a_missing_value_is_shown_as_a_dash() -> None:
    panel = LivePanel()
    panel.latest = {"step": 1, "loss": 5.5}
    assert re.search(r"validation loss +– .*bits per byte +–", "\n".join(drawn(panel, 80)))


def test_the_panel_delays_no_step(tmp_path: Path) -> None:
    """On a terminal a row and its progress take less than a millisecond, far less than the shortest step."""
    console = Console(file=StringIO(), force_terminal=True, width=80)
    report = RunReport(tmp_path, console, matrix_tokens_per_second=1e3)
    times = []
    for step in range(1, 501):
        started = time.perf_counter()
        report.row(**{**MEASURED, "step": step})
        report.progress(step / 500, 10.0)
        times.append(time.perf_counter() - started)
    time.sleep(2.5 / REFRESH_RATE)
    report.close()
    assert "gradient norm" in console.file.getvalue()  # type: ignore[attr-defined]
    assert sorted(times)[len(times) // 2] < 1e-3  # the median, since other processes may interrupt


def test_lines_stay_above_the_panel(tmp_path: Path) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80, color_system=None)
    report = RunReport(tmp_path, console)
    report.row(step=1, tokens=8, loss=2.0, val_loss=2.5)
    report.evaluated(0.5, 10.0)
    report.close()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert " 50% · step 1 · loss 2.000 · validation 2.500\n" in output


def test_nothing_is_printed_on_a_quiet_console(tmp_path: Path) -> None:
    console = Console(file=StringIO(), force_terminal=True, quiet=True)
    report = RunReport(tmp_path, console)
    report.row(step=1, tokens=8, loss=2.0)
    report.evaluated(0.5, 10.0)
    report.close()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_curve_has_bounded_memory() -> None:
    curve = Curve(16)
    for value in range(10_000):
        curve.add(float(value))
    assert len(curve.means) <= 16
    assert curve.means == sorted(curve.means)
    assert curve.means[0] == pytest.approx((curve.stride - 1) / 2)  # the mean of the first `stride` values


def test_a_curve_ignores_nan_and_inf() -> None:
    curve = Curve()
    for value in (1.0, nan, inf, 2.0):
        curve.add(value)
    assert curve.means == [1.0, 2.0]


def test_a_sparkline_falls_where_the_loss_falls() -> None:
    assert sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▇▅▁"
    assert sparkline([1.0] * 9, 3) == "▁▁▁"
    assert sparkline([], 10) == ""
    assert len(sparkline([float(i) for i in range(1000)], 60)) == 60


def test_durations_and_large_numbers_are_formatted_readably() -> None:
    assert [format_time(s) for s in (0, 61, 3661, 8 * 86400)] == ["0:00", "1:01", "1:01:01", "8 days"]
    assert [format_large(n, "B") for n in (512, 2_000_000, 6.3e9)] == ["512 B", "2 MB", "6.3 GB"]


# The plot


def test_the_running_mean_keeps_a_line_and_smooths_noise() -> None:
    line = np.linspace(5, 1, 200)
    np.testing.assert_allclose(running_mean(line)[2:-2], line[2:-2])
    noise = np.random.default_rng(0).normal(size=2000)
    assert running_mean(noise).std() < 0.25 * noise.std()
    assert running_mean(np.array([3.0])) == [3.0]


def test_fonts_are_listed_beside_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    if font_manager := sys.modules.get("matplotlib.font_manager"):  # put back, since its classes are in use
        monkeypatch.setattr("matplotlib.font_manager", font_manager)
        monkeypatch.delitem(sys.modules, "matplotlib.font_manager")
    prepare_fonts().join(60)
    assert "matplotlib.font_manager" in sys.modules


@pytest.mark.parametrize("n", [0, 1, 500])
def test_a_run_of_any_length_is_plotted(tmp_path: Path, n: int) -> None:
    rows: list[dict[str, Any]] = [{"step": i, "tokens": 8 * i, "loss": 5 - i / 200} for i in range(n)]
    rows += [{"step": n, "tokens": 8 * n, "val_loss": 3.0}, {"step": n, "tokens": 8 * n, "loss": None}]
    plot_loss(rows, {"ln V": 5.5, "unigram": 3.3, "bigram": 3.25}, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# Trackers


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
