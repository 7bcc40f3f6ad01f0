"""Short runs of ``mlx-gpt train``: their metrics, their comparison, Ctrl-C during a step, a text to overfit."""

from __future__ import annotations

import json
import random
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_gpt.device import on_cpu
from mlx_gpt.store.checkpoint import list_checkpoints
from mlx_gpt.train import clock as clock_module

SIZE = "--tokenizer bytes --n-positions 16 --n-embd 16 --n-layer 1 --n-head 2 --batch-size 2"
HOW = "--learning-rate 0.001 --eval-every 5 --checkpoint-every 4 --resid-pdrop 0.1"
RUN = shlex.split(f"train --data text.txt {SIZE} {HOW}")
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}
OVERFIT = [*RUN, "--learning-rate", "0.03", "--eval-windows", "0", "--warmup", "0", "--schedule", "wsd"]


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times and memory."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in read]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit on a CPU; a GPU adds the gradients of an embedding in a varying order."""
    if not on_cpu():
        for row, other_row in zip(rows(one), rows(other), strict=True):
            assert row == pytest.approx(other_row, rel=1e-3)
        return
    assert rows(one) == rows(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def interrupt_during(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    """Send signals, or press Ctrl-C, during a step."""
    done = clock_module.Clock.done
    left = [*(signals or (signal.SIGINT,))]

    def watched(clock: clock_module.Clock, n: int) -> float:  # called before each step
        while n == step and left and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.raise_signal(left.pop())
        return done(clock, n)

    monkeypatch.setattr(clock_module.Clock, "done", watched)


def newest(run: Path) -> str:
    return list_checkpoints(run)[0].name


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def noise(here: Path) -> None:
    """Write a text with nothing to learn but the frequency of letters, so that further training overfits."""
    rng = random.Random(0)
    (here / "text.txt").write_text("".join(rng.choices("abcd ", (8, 4, 2, 1, 1), k=400)))
