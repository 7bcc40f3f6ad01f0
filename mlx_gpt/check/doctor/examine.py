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

    Arrays may be of MLX, torch or NumPy. B is the number of texts in a batch, T their length, V ``vocab_size``; ``x``
    and ``y`` are the inputs and targets of a batch, ids (B, T). Only ``forward`` and the two sizes are required.

    The model:
        forward: ids (B, T), a NumPy array of int32 -> logits (B, T, V). Or a module of MLX or torch, from which its
            forward passes in both modes, its parameters, their gradient, a step of AdamW, and the sizes in its config
            are taken.
        forward_training: The same in training mode, with dropout on.
        parameters: () -> a copy of the parameters, a dict of arrays.
        load_parameters: a dict as ``parameters`` returns -> None. Sets the parameters.
        cached: (ids, n_prompt) -> logits (T, V). Reads n_prompt of the ids at once and the others one at a time, with
            the key-value cache.
        reload: () -> the forward function of the model saved and loaded again.
    Training:
        loss: (x, y) -> the loss that training minimises, a number.
        gradient: (x, y) -> the gradient of the mean loss in evaluation mode, a dict of arrays. Frozen parameters may be
            absent.
        step: (x, y) -> the loss, a number. Makes one optimizer step, at ``learning_rate``, from the present parameters.
        new_step: () -> a step with a fresh optimizer.
        batches: () -> an iterator of the (x, y) that training is fed.
        metrics: A metrics.jsonl, or a list of dicts with step, loss, val_loss, learning_rate, grad_norm.
        val_loss: The validation loss that was reported.
    Generation:
        sample: (ids, n, **settings) -> n new ids, or the prompt and n new ids.
        sample_many: (prompts, n, **settings) -> a list of ids for each prompt. The prompts differ in length.
        sample_settings: The names of the settings that ``sample`` accepts. Those examined, and their values for off:
            temperature 1 (0 is greedy), top_k 0, top_p 1, repetition_penalty 1.
    Text:
        encode, decode: str -> ids, and ids -> str, as used for generation.
        encode_training: str -> ids, where training used another function.
        end_of_text: The id that ends a text.
        train_ids, val_ids: The ids of the training and the validation text, in one array or as a list of documents.
        train_text: The text of ``train_ids``, or its beginning.
    minutes: The time that the examination may take.

    What the functions raise, print or change is reported. Parameters are restored where ``load_parameters`` allows.
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
    arguments = checked(with_module(dict(given)))
    sizes = [arguments.pop(name) for name in ("vocab_size", "n_positions", "minutes")]
    return Case(arguments, *sizes)


def with_module(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, and those taken from the module where ``forward`` is one; given ones take precedence."""
    module = given.get("forward")
    if not is_module(module):
        return given
    taken, sizes = arguments_of(module)
    own = {name: value for name, value in given.items() if value is not None and name != "forward"}
    return {**taken, **sizes, **own}


def run_checks(
    case: Case, checks: Sequence[DoctorCheck], on_check: Callable[[DoctorCheck], object] = lambda check: None
) -> Report:
    """Run the checks in the order of ``CHECKS``, and report. ``on_check`` is called before each."""
    return Examination(case, checks).run(on_check)


class Examination:
    """The checks of a case, the findings so far, and which checks have run or were skipped."""

    def __init__(self, case: Case, checks: Sequence[DoctorCheck]):
        self.case, self.checks = case, checks
        self.findings: dict[str, Finding] = {}
        self.explains = defaultdict(set, {check.code: {*check.explains} for check in checks})
        self.separate: dict[str, set[str]] = {}  # code -> earlier findings of which it is measured to be no consequence
        self.examined: list[str] = []
        self.skipped = {check.code: missing for check in checks if (missing := check.missing(case))}

    def run(self, on_check: Callable[[DoctorCheck], object] = lambda check: None) -> Report:
        checks = [check for check in self.checks if check.code not in self.skipped]
        groups = list(dict.fromkeys(group_of(check.code) for check in checks))
        group, module = "", module_of(self.case)
        with random_states_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about the infinities of a faulty model
            for check in checks:
                if group_of(check.code) != group:
                    group = group_of(check.code)
                    self.case.begin_group(len(groups) - groups.index(group))
                on_check(check)
                with module_kept(module):  # the user's step may leave dropout on
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
        except Exception as error:  # the user's functions returned something that the check does not expect
            self.skipped[check.code] = f"no {type(error).__name__} in this check: {error}"
        else:
            self.examined.append(check.code)
            if found is not None:
                self.add(check, found)

    def add(self, check: DoctorCheck, fields: dict[str, Any]) -> None:
        if fields.pop("separate", False):
            self.separate[check.code] = {*self.case.found}
        self.case.found[check.code] = fields
        self.explains[check.code] = {*fields.pop("explains", check.explains)}
        self.findings[check.code] = Finding(code=check.code, severity=check.severity, **fields)

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
        """Return the report so far: a call does not return, and the checks that have not run are skipped for it."""
        for check in self.checks:
            if check.code not in {*self.examined, *self.skipped}:
                self.fail(check, failure)
        return self.report()


def failed_call(failure: CallFailed) -> Finding:
    """Return the finding for a call that raised, took too long or returned something of the wrong kind."""
    remedies = {
        "raises": f"call {failure.name} by itself on such input, and repair what raises",
        "wrong-shape": f"let {failure.name} do and return what its description in examine() says",
        "non-finite": f"look for log(0), a division by zero, or an overflow in what {failure.name} computes",
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
    """Return the findings in the order of repair; those that another explains are listed as its consequences only."""
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
        independent = {code, *(other for other, earlier in separate.items() if code in earlier)}
        explained[code] = consequences(code, explains, findings.keys() - hidden - independent)
        hidden.update(explained[code])
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
    """Return the codes ``among`` some that a code explains, itself or through others, in the order of repair."""
    reached: set[str] = set()
    new = {code}
    while new := {other for cause in new for other in explains[cause] & among} - reached:
        reached |= new
    return sorted(reached, key=ORDER.__getitem__)
