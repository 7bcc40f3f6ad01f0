"""Functions that raise, print, block, keep state or return other shapes end in findings, within the minutes."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.plain_gpt import PlainConfig, PlainGPT
from helpers.plain_sampler import small_forward

from mlx_gpt.check.doctor import Report, examine
from mlx_gpt.check.doctor.calls import time_limit
from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed
from mlx_gpt.check.doctor.checks import DoctorCheck
from mlx_gpt.check.doctor.examine import make_case, run_checks

V, P = 31, 24
sound = small_forward(V, P)


def examined(forward: Any, **given: Any) -> Report:
    report = examine(forward, **{"vocab_size": V, "n_positions": P, "minutes": 0.5, **given})
    assert not [reason for reason in report.skipped.values() if " in this check" in reason]
    return report


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def raising(error: BaseException) -> Callable[[Any], Any]:
    def forward(ids: Any) -> Any:
        raise error

    return forward


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def swallows_the_first_alarm(ids: np.ndarray) -> None:
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


@pytest.mark.parametrize(
    ("forward", "code"),
    [
        (raising(SystemExit("no")), "raises"),
        (raising(KeyboardInterrupt()), "raises"),
        (raising(MemoryError()), "raises"),
        (lambda ids: os._exit(3), "raises"),
        (lambda ids: np.array([object()]), "wrong-shape"),
        (lambda ids: "hello", "wrong-shape"),
        (lambda ids: [[1.0], [1.0, 2.0]], "wrong-shape"),
        (lambda ids: {"probabilities": 1.0}, "wrong-shape"),
        (raising(Unspeakable()), "raises"),
        (lambda ids: 1.0, "wrong-shape"),
        (lambda ids: sound(ids)[:, -1], "wrong-shape"),
        (lambda ids: sound(ids).swapaxes(0, 1), "wrong-shape"),
        (lambda ids: sound(ids) * np.nan, "non-finite"),
        (lambda ids: np.where((ids == 7).any(axis=1)[:, None, None], np.nan, sound(ids)), "non-finite"),
    ],
)
def test_a_forward_that_fails_is_one_finding(forward: Any, code: str) -> None:
    report = examined(forward)
    assert codes(report) == [code]
    report.to_json()


def nothing(*_: Any) -> None:
    return None


def one_array(x: Any, y: Any) -> dict[str, np.ndarray]:
    return {"wte": np.ones((V, 4))}


@pytest.mark.parametrize(
    ("given", "code", "why"),
    [
        ({"loss": nothing}, "wrong-shape", "loss returned NoneType; expected an array of numbers"),
        ({"loss": lambda x, y: "3"}, "wrong-shape", "loss returned str"),
        ({"loss": lambda x, y: np.nan}, "non-finite", "loss is NaN or infinite for ordinary ids"),
        ({"gradient": nothing}, "wrong-shape", "gradient returned NoneType; expected a dict of arrays"),
        ({"gradient": lambda x, y: [np.ones(3)]}, "wrong-shape", "gradient returned list"),
        ({"gradient": lambda x, y: {"wte": np.full((V, 4), np.nan)}}, "non-finite", "1 of 1 arrays of gradient are"),
        (
            {"gradient": one_array, "parameters": lambda: {"wte": np.ones((4, V))}},
            "wrong-shape",
            "gradient returned shape (31, 4) for wte; expected (4, 31), as the parameter has",
        ),
        ({"gradient": one_array, "parameters": lambda: {"w": np.ones(3)}}, "wrong-shape", "such as wte, which no"),
        ({"encode": nothing, "decode": str}, "wrong-shape", "encode returned NoneType"),
        ({"sample": nothing}, "wrong-shape", "sample returned NoneType"),
        ({"reload": lambda: None}, "wrong-shape", "reload returned NoneType; expected a forward function"),
    ],
)
def test_a_function_that_returns_something_else_is_named_with_what_it_returned(
    given: dict[str, Any], code: str, why: str
) -> None:
    loss = {"loss": lambda x, y: 3.0} if "gradient" in given else {}
    report = examined(sound, **loss, **given, train_text="to be or not to be " * 50 if "encode" in given else None)
    assert (report.findings[0].code, why in report.findings[0].why) == (code, True), report


@pytest.mark.parametrize(
    "forward",
    [
        lambda ids: sound(ids).tolist(),
        lambda ids: (sound(ids), None),
        lambda ids: {"logits": sound(ids)},
        lambda ids: mx.array(sound(ids)),
        lambda ids: sound(ids).astype(np.float64),
        lambda ids: print("a line", file=sys.stderr) or sound(ids),
        lambda ids: np.random.seed(0) or sound(ids),
    ],
)
def test_a_sound_forward_in_another_form_has_no_finding(forward: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert codes(examined(forward)) == []
    assert capsys.readouterr() == ("", "")


def catches_everything(ids: np.ndarray) -> None:
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def suppresses_everything(ids: np.ndarray) -> None:
    while True:
        with suppress(BaseException):
            time.sleep(60)


def test_a_time_limit_whose_end_an_alarm_prevents_does_not_stop_later_code() -> None:
    def call() -> Any:
        context = time_limit(0.05)
        context.__enter__()
        return context

    before = signal.getsignal(signal.SIGALRM)
    context = call()
    time.sleep(0.1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    context.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGALRM) is before


BLOCKS = [lambda ids: time.sleep(60), swallows_the_first_alarm, catches_everything, suppresses_everything]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_forward_that_blocks_is_too_slow_within_the_minutes(block: Any) -> None:
    start = time.monotonic()
    report = examined(block, minutes=0.04)
    assert codes(report) == ["too-slow"]
    assert time.monotonic() - start < 2.4 + 3


def test_a_sampler_that_blocks_after_calls_that_returned_is_too_slow() -> None:
    calls = iter(range(9))
    sample = lambda ids, n: time.sleep(60) if next(calls, 9) > 6 else [0] * n  # noqa: E731
    case = make_case({"forward": sound, "sample": sample, "vocab_size": V, "n_positions": P, "minutes": 0.05})
    failures = []
    for _ in range(10):
        try:
            case.call("sample", [0], 1)
        except CallFailed as failure:
            failures.append(failure.code)
        except BudgetSpent:
            break
    assert failures == ["too-slow"]


def test_a_forward_that_has_no_time_is_not_examined_and_no_finding() -> None:
    report = examined(lambda ids: time.sleep(0.5) or sound(ids), minutes=0.01)
    assert codes(report) == []
    assert "minutes" in report.skipped.values()


def test_a_slow_function_does_not_starve_the_other_groups() -> None:
    start = time.monotonic()
    report = examined(sound, minutes=0.06, cached=lambda ids, n: time.sleep(60), sample=lambda ids, n: [0] * n)
    assert time.monotonic() - start < 3.6 + 3
    assert "sampler-too-narrow" in {*report.examined, *codes(report)}


def test_parameters_that_a_step_changed_are_restored_when_the_time_ends_in_it() -> None:
    weights = {"w": np.zeros(3, np.float32)}

    def step(x: Any, y: Any) -> float:
        weights["w"] = np.ones(3, np.float32)
        case.group_end = 0.0
        return 0.0

    given = {"forward": sound, "step": step, "parameters": lambda: {**weights}, "load_parameters": weights.update}
    case = make_case({**given, "vocab_size": V, "n_positions": P, "minutes": 1.0})
    with suppress(BudgetSpent), case.parameters_restored():
        case.call("step", 0, 0)
        case.call("step", 0, 0)
    assert not weights["w"].any()


@pytest.mark.parametrize(
    ("loads", "first_loss", "code", "why"),
    [
        (False, 3.0, "wrong-shape", "load_parameters left w as it was"),
        (True, np.nan, "non-finite", "step returned nan at its first call"),
    ],
)
def test_a_step_that_cannot_be_judged_is_no_fault_of_the_optimizer(
    loads: bool, first_loss: float, code: str, why: str
) -> None:
    weights = {"w": np.zeros(V, np.float32)}

    def step(x: Any, y: Any) -> float:
        weights["w"] = weights["w"] - 0.1
        return first_loss

    report = examined(
        lambda ids: sound(ids) + weights["w"],
        step=step,
        new_step=lambda: step,
        parameters=lambda: {**weights},
        load_parameters=weights.update if loads else nothing,
    )
    assert [(code, why)] == [(finding.code, finding.why) for finding in report.findings], report


def test_the_minutes_end_in_another_thread() -> None:
    reports = []
    run = lambda: reports.append(examined(lambda ids: time.sleep(0.2) or sound(ids), minutes=0.03))  # noqa: E731
    thread = threading.Thread(target=run)
    start = time.monotonic()
    thread.start()
    thread.join(20)
    assert time.monotonic() - start < 1.8 + 3
    assert "minutes" in reports[0].skipped.values()


def test_the_hint_names_the_padded_vocabulary_and_the_last_position() -> None:
    (padded,) = examined(sound, vocab_size=V - 1).findings
    assert f"vocab_size={V}" in padded.why
    (last,) = examined(lambda ids: sound(ids)[:, -1:]).findings
    assert "last position only" in last.why


def test_random_states_and_modes_are_as_before() -> None:
    model = PlainGPT(PlainConfig(dropout=0.1))
    model.train()
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    mx.random.seed(3), np.random.seed(3), random.seed(3)
    states = mx.random.state[0].tolist(), np.random.get_state()[1].tolist(), random.getstate()
    examine(model, sample=lambda ids, n: np.random.randint(0, 61, n), minutes=0.05)
    assert states == (mx.random.state[0].tolist(), np.random.get_state()[1].tolist(), random.getstate())
    assert modes == [part.training for part in model.modules()]


def test_a_mode_that_a_step_leaves_behind_does_not_reach_the_next_check() -> None:
    model, modes = PlainGPT(PlainConfig(dropout=0.1)), []
    model.eval()

    def check(find: Callable[[Any], Any]) -> DoctorCheck:
        return DoctorCheck("raises", lambda case: find(case) and None, (), ())

    given = {"forward": lambda ids: model(mx.array(ids)), "vocab_size": 61, "n_positions": 16, "minutes": 1.0}
    checks = [check(lambda case: model.train()), check(lambda case: modes.append(model.training))]
    run_checks(make_case(given), checks)
    assert modes == [False]


def test_an_unknown_argument_names_the_closest() -> None:
    with pytest.raises(TypeError, match=r"no argument 'vocab_siz'; did you mean 'vocab_size'\?"):
        examine(sound, vocab_siz=V, n_positions=P)
    with pytest.raises(TypeError, match="vocab_size is missing"):
        examine(sound, n_positions=P)
