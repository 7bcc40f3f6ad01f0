"""The live panel shows every number, fits its terminal and delays no step."""

from __future__ import annotations

import re
import time
from io import StringIO
from math import inf, nan
from pathlib import Path

import pytest
from rich.console import Console

from mlx_gpt.train.report.metrics import RunReport
from mlx_gpt.train.report.panel import REFRESH_RATE, Curve, LivePanel, sparkline
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


def drawn(panel: LivePanel, width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(panel)
    return capture.get().splitlines()


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
