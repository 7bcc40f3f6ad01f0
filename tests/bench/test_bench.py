"""``mlx-gpt bench`` measures limits and sides, keeps what it has measured, and its tables are those of the files."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import ROOT, check_error

from mlx_gpt.bench import measure, system
from mlx_gpt.bench.measure import Round, Workload, in_turn
from mlx_gpt.bench.report import tables
from mlx_gpt.bench.sides import OURS, SIDES
from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig

CONFIG = GPTConfig(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=1)
SMALL = Workload(CONFIG, 2, CONFIG, prompt=8, tokens=5, rounds=2, seconds=0.01)
SYSTEM = {"versions": {}, "chip": "", "device": "cpu", "memory_bytes": 0, "system": "", "power": "unknown"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Workload", lambda: SMALL)
    monkeypatch.setattr(system, "SIZES", (64, 128))
    monkeypatch.setattr(system, "COPIED", 1 << 20)


def bench(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["bench", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_limits_training_and_generation_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--against", "", "--picture", str(tmp_path / "bench.png"))
    assert found["system"]["versions"].keys() >= {"mlx", "python"}
    assert found["limits"]["matrix_product"]["float32"].keys() == {"64", "128"}
    for part in ("training", "generation"):
        assert found[part].keys() == {OURS}
        low, high = found[part][OURS]["spread"]
        assert 0 < low <= found[part][OURS]["tokens_per_second"] <= high
        assert found[part][OURS]["share_of_limit"] > 0
    assert found["generation"][OURS]["kernels_per_token"] > 10
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    lines = "\n".join(tables(found))
    assert f"| training | {OURS} |" in lines
    assert "| kernels per token |" in lines


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in SIDES if name != OURS])
def test_each_side_that_is_installed_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SIDES[name].is_installed:
        pytest.skip(f"needs {SIDES[name].needs}")
    if name == "torch":  # its compiler takes a minute; here it fails, as where there is none
        monkeypatch.setattr("torch.compile", lambda _: lambda _: 1 / 0)
    found = bench(capsys, "--against", name)
    for part, side in (("training", SIDES[name].train), ("generation", SIDES[name].speak)):
        assert (name in found[part]) is (side is not None)
        assert side is None or found[part][name]["tokens_per_second"] > 0


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_generation", stop)
    assert main(["bench", "--json", "--against", ""]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out)["training"][OURS]["tokens_per_second"] > 0
    assert "this is what was measured" in err


class Clock:
    """A clock that work moves on."""

    now = 0.0

    def start(self, one: dict[str, Any], warm_up: float, round_: float, share: float) -> Round:
        self.now += warm_up
        one["share"] = share

        def measure() -> None:
            self.now += round_
            one["rounds"] = one.get("rounds", 0) + 1

        return Round(measure, round_)


@pytest.mark.parametrize(
    ("sides", "rounds"),
    [
        ({"ours": (1, 2), "b": (1, 2)}, {"ours": 3, "b": 3}),  # all fit
        ({"ours": (1, 10), "b": (1, 10)}, {"ours": 1, "b": 1}),  # of the other rounds none fits
        ({"ours": (5, 5), "b": (1, 1000), "c": (1, 2)}, {"ours": 2, "b": None, "c": 3}),  # one is too slow
        ({"ours": (1, 2), "b": (1000, 1), "c": (1, 1)}, {"ours": 1, "b": None, "c": None}),  # and takes all the time
    ],
)
def test_no_round_ends_after_the_budget_and_what_does_not_fit_is_reported(
    sides: dict[str, tuple[float, float]], rounds: dict[str, int | None]
) -> None:
    clock = Clock()
    found: dict[str, Any] = {name: {} for name in sides}
    starts = {name: partial(clock.start, found[name], *times) for name, times in sides.items()}
    in_turn(starts, 3, 25.0, lambda _: None, found, lambda: clock.now)
    assert {name: one.get("rounds") for name, one in found.items()} == rounds
    assert {name for name, one in found.items() if "skipped" in one} == {n for n, k in rounds.items() if k is None}
    assert clock.now <= 25 + max(warm_up for warm_up, _ in sides.values())
    assert found["ours"]["share"] == 25 / len(sides) / 4


def test_a_side_that_fails_is_reported_and_the_others_are_measured() -> None:
    clock = Clock()
    found: dict[str, Any] = {"b": {}, "c": {}}

    def fail(_: float) -> Round:
        raise ValueError("no such\nkernel")

    in_turn({"b": fail, "c": partial(clock.start, found["c"], 1, 1)}, 2, 25.0, print, found, lambda: clock.now)
    assert found["b"] == {"skipped": "ValueError: no such kernel"}
    assert found["c"]["rounds"] == 2
    assert "training, b, skipped: ValueError: no such kernel" in tables({"system": SYSTEM, "training": found})


def test_an_unknown_side_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_error(["bench", "--against", "jax"], 2, "--against takes mlx-lm, torch, transformers", tmp_path, capsys)


def test_the_tables_of_the_readme_are_made_from_the_files_of_results() -> None:
    script = runpy.run_path(str(ROOT / "tests/benchmarks/tables.py"))
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    assert page.count(script["BEGIN"]) == page.count(script["END"]) == 1
    assert script["updated"](page) == page
