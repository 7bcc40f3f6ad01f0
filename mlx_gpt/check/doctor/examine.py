"""Run the checks on a model within a time budget, and put the findings in order."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlx_gpt.check.doctor.arguments import checked
from mlx_gpt.check.doctor.calls import random_states_kept
from mlx_gpt.check.doctor.case import BudgetSpent, CallFailed, Case
from mlx_gpt.check.doctor.checks import CHECKS, DoctorCheck, NotApplicable
from mlx_gpt.check.doctor.codes import ORDER, RESTS_ON, group_of, severity_of
from mlx_gpt.check.doctor.inside import module_of
from mlx_gpt.check.doctor.module_arguments import arguments_of
from mlx_gpt.check.doctor.modules import is_module, module_kept
from mlx_gpt.check.doctor.report import TIME, Finding, Report


def examine(
    forward: Any,
    *,
    vocab_size: int | None = None,
    n_positions: int | None = None,
    forward_training: Any = None,
    loss: Any = None,
    gradient: Any = None,
    parameters: Any = None,
    load_parameters: Any = None,
    step: Any = None,
    learning_rate: float | None = None,
    new_step: Any = None,
    sample: Any = None,
    sample_many: Any = None,
    sample_settings: Any = None,
    cached: Any = None,
    reload: Any = None,
    encode: Any = None,
    decode: Any = None,
    encode_training: Any = None,
    end_of_text: int | None = None,
    batches: Any = None,
    train_ids: Any = None,
    val_ids: Any = None,
    train_text: str | None = None,
    metrics: str | Path | Sequence[Mapping[str, Any]] | None = None,
    val_loss: float | None = None,
    minutes: float = 1.0,
    **unknown: Any,
) -> Report:
    """Examine a GPT and return what is wrong with it, in the order in which to repair it.

    ``forward`` maps ids (B, T) int32, a NumPy array, to logits (B, T, V) of MLX, NumPy or torch; or it is an
    ``mlx.nn.Module`` or ``torch.nn.Module``, from which forward passes in both modes, parameters, gradient and a step
    are taken, and the two numbers where its config has them.

    ``forward_training``: the same in training mode. ``loss(x, y) -> float``: the user's own, ids (B, T) each.
    ``gradient(x, y) -> dict``: of the mean loss in evaluation mode; frozen parameters may be absent. ``parameters() ->
    dict``: a copy. ``load_parameters(dict)``. ``step(x, y) -> float``: one optimizer step at ``learning_rate``, returns
    its loss; ``new_step() -> step``: with a fresh optimizer. ``sample(ids, n, **settings) -> list``: n new ids, or the
    prompt and n; ``sample_many(prompts, n, **settings)``: of different lengths; ``sample_settings``: names of what
    ``sample`` accepts. ``cached(ids, n_prompt) -> logits (T, V)``: prefill, then one token at a time. ``reload() ->
    forward``: saved and loaded again. ``encode``, ``decode``: as used for generation; ``encode_training`` where
    training used another. ``end_of_text``: the id that ends a text. ``batches() -> iterator of (x, y)``: what training
    is fed. ``metrics``: a metrics.jsonl, or dicts with step, loss, val_loss, learning_rate, grad_norm. ``val_loss``:
    as reported. ``minutes``: time budget.

    What the functions raise, print or change is reported; parameters are restored where ``load_parameters`` allows.
    Raises ``TypeError`` for wrong arguments and ``ValueError`` for wrong values.
    """
    given = dict(locals())
    if unknown := given.pop("unknown"):
        name = next(iter(unknown))
        close = get_close_matches(name, given, 1, 0.5)
        raise TypeError(f"examine() has no argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return run_checks(make_case(given), CHECKS)


def make_case(given: Mapping[str, Any]) -> Case:
    """Return the case of the arguments of ``examine``. Raises ``TypeError`` or ``ValueError``."""
    found = checked(with_module(dict(given)))
    sizes = [found.pop(name) for name in ("vocab_size", "n_positions", "minutes")]
    return Case(found, *sizes)


def with_module(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with what an MLX or torch module gives, where ``forward`` is one."""
    module = given.get("forward")
    if not is_module(module):
        return given
    taken, sizes = arguments_of(module)
    own = {name: value for name, value in given.items() if value is not None and name != "forward"}
    return {**taken, **sizes, **own}


def run_checks(
    case: Case, checks: Sequence[DoctorCheck], on_check: Callable[[DoctorCheck], object] = lambda check: None
) -> Report:
    """Run the checks in order, the cheap ones that explain the others first. ``on_check`` is called before each."""
    return Examination(case, checks).run(on_check)


class Examination:
    """Checks of a case, and what those that have run found."""

    def __init__(self, case: Case, checks: Sequence[DoctorCheck]):
        self.case, self.checks = case, checks
        self.findings: dict[str, Finding] = {}
        self.explains = defaultdict(set, {check.code: {*check.explains} for check in checks})
        self.separate: dict[str, set[str]] = {}  # findings measured not to be consequences of these, found before
        self.examined: list[str] = []
        self.skipped = {check.code: missing for check in checks if (missing := check.missing(case))}

    def run(self, on_check: Callable[[DoctorCheck], object] = lambda check: None) -> Report:
        checks = [check for check in self.checks if check.code not in self.skipped]
        groups = list(dict.fromkeys(group_of(check.code) for check in checks))
        group, module = "", module_of(self.case)
        with random_states_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy about the infinities of a faulty model
            for check in checks:
                if group_of(check.code) != group:
                    group = group_of(check.code)
                    self.case.begin_group(len(groups) - groups.index(group))
                on_check(check)
                with module_kept(module):  # a step of the user's may leave dropout on
                    self.examine(check)
        return self.report()

    def examine(self, check: DoctorCheck) -> None:
        try:
            found = check.find(self.case)
        except BudgetSpent:
            self.skipped[check.code] = TIME
        except NotApplicable as reason:
            self.skipped[check.code] = str(reason)
        except CallFailed as failure:
            self.fail(check, failure)
        except Exception as error:  # the user's functions returned what no check foresaw
            self.skipped[check.code] = f"no {type(error).__name__} in this check: {error}"
        else:
            self.examined.append(check.code)
            if found is not None:
                self.add(check, found)

    def add(self, check: DoctorCheck, found: dict[str, Any]) -> None:
        if found.pop("separate", False):
            self.separate[check.code] = {*self.case.found}
        self.case.found[check.code] = found
        self.explains[check.code] = {*found.pop("explains", check.explains)}
        self.findings[check.code] = Finding(code=check.code, severity=check.severity, **found)

    def fail(self, check: DoctorCheck, failure: CallFailed) -> None:
        self.findings.setdefault(failure.code, failed_call(failure))
        self.skipped[check.code] = failure.name

    def report(self) -> Report:
        for code in [code for code, group in RESTS_ON.items() if code in self.findings and self.is_late(group)]:
            del self.findings[code]
            self.examined.remove(code)
            self.skipped[code] = TIME
        findings = in_order(self.findings, self.checks, self.explains, self.separate)
        return Report(
            findings, self.examined, {c.code: self.skipped[c.code] for c in self.checks if c.code in self.skipped}
        )

    def is_late(self, group: str) -> bool:
        return any(reason == TIME and group_of(code) == group for code, reason in self.skipped.items())

    def ended_by(self, failure: CallFailed) -> Report:
        """Return the report so far, where a call that does not return ends the examination."""
        for check in self.checks:
            if check.code not in {*self.examined, *self.skipped}:
                self.fail(check, failure)
        return self.report()


def failed_call(failure: CallFailed) -> Finding:
    """Return the finding for a function that raised, blocked or returned something else."""
    remedies = {
        "raises": f"call {failure.name} by itself on such input, and repair what raises",
        "wrong-shape": f"return from {failure.name} what its description in examine() says",
        "too-slow": f"make {failure.name} faster, examine a smaller model, or give more minutes",
    }
    return Finding(
        failure.code, severity_of(failure.code), failure.message, "a result", failure.message, remedies[failure.code],
        {"function": failure.name},
    )  # fmt: skip


def in_order(
    findings: dict[str, Finding],
    checks: Sequence[DoctorCheck],
    explains: Mapping[str, set[str]],
    separate: Mapping[str, set[str]],
) -> list[Finding]:
    """Return the findings in the order of repair, with those that another explains as its consequences."""
    for check in checks:
        for code in findings:
            in_group = findings[code].severity == "fault" and group_of(code) in check.explained_by
            if code != check.code and (in_group or code in check.explained_by):
                explains[code].add(check.code)
    explained: dict[str, list[str]] = {}
    hidden: set[str] = set()
    for code in sorted(findings, key=lambda code: ORDER[code]):
        if code in hidden:
            continue
        apart = {code, *(other for other, found in separate.items() if code in found)}
        mine = consequences(code, explains, findings.keys() - hidden - apart)
        hidden.update(mine)
        explained[code] = mine
    severity = {"fault": 0, "warning": 1, "note": 2}
    shown = [code for code in explained if code not in hidden]
    shown.sort(key=lambda code: (severity[findings[code].severity], ORDER[code]))
    return [
        replace(findings[code], evidence={**findings[code].evidence, "consequences": explained[code]})
        if explained[code]
        else findings[code]
        for code in shown
    ]


def consequences(code: str, explains: Mapping[str, set[str]], among: Set[str]) -> list[str]:
    """Return the codes that a code explains, and what these explain, in the order of repair."""
    mine: set[str] = set()
    new = {code}
    while new := {other for one in new for other in explains[one] & among} - mine:
        mine |= new
    return sorted(mine, key=ORDER.__getitem__)
