"""The doctor's checks of weights name each planted fault alone, pass healthy models, and restore the parameters."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.numpy_gpt import NumpyGPT
from helpers.plain_gpt import PlainConfig, PlainGPT
from helpers.planted import Base, Given
from helpers.planted_weights import FAULTS
from mlx.utils import tree_flatten

from mlx_gpt import GPT, GPTConfig
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.examine import make_case, run_checks
from mlx_gpt.check.doctor.report import Report

OURS = [check for check in CHECKS if check.find.__module__.startswith("mlx_gpt.check.doctor.weights")]


def examined(given: Given) -> Report:
    return run_checks(make_case({**given, "minutes": 10.0}), OURS)


def codes(given: Given) -> list[str]:
    return [finding.code for finding in examined(given).findings]


@pytest.mark.parametrize("name", [name for name, planted in FAULTS.items() if False in planted.states])
def test_a_planted_fault_is_named_alone(name: str) -> None:
    planted = FAULTS[name]
    given = planted.plant(Base(planted.sizes[0]))
    before = {name: np.array(value) for name, value in given["parameters"]().items()}
    report = examined(given)
    assert [finding.code for finding in report.findings] == [planted.code]
    report.to_json()
    after = given["parameters"]()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


@pytest.mark.parametrize("size", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sound_model_given_as_functions_has_no_finding(size: int) -> None:
    report = examined(Base(size).arguments())
    assert report.findings == []
    assert report.skipped.keys() <= {"precision-loss"}


@pytest.mark.parametrize("fault", ["heads-mixed-up", "residual-after-norm", "mlp-not-added"])
def test_a_module_is_looked_into(fault: str) -> None:
    code = "layer-without-effect" if fault == "mlp-not-added" else fault
    assert codes({"forward": PlainGPT(PlainConfig(layers=2), {fault})}) == [code]


@pytest.mark.parametrize("tensor", ["queries", "keys", "values"])
def test_one_tensor_reshaped_without_a_transpose_is_recognised(tensor: str) -> None:
    report = examined({"forward": PlainGPT(PlainConfig(layers=2), {f"{tensor}-split-wrongly"})})
    assert [one.code for one in report.findings] == ["heads-mixed-up"]
    assert f"a reshape of {tensor}" in report.findings[0].why


IN_NUMPY = {
    "": [],
    "split wrongly": ["heads-mixed-up"],
    "merged wrongly": ["heads-mixed-up"],
    "split and merged wrongly": ["heads-mixed-up"],
    "not transposed": ["heads-mixed-up"],
    "attention dropped": ["layer-without-effect"],
    "MLP dropped": ["layer-without-effect"],
    "head is a copy": ["head-not-tied"],
    "stream after norm": ["residual-after-norm"],
    "no stream": ["residual-after-norm"],
    "attention without a stream": ["residual-after-norm"],
    "MLP without a stream": ["residual-after-norm"],
    "norm after the addition, by design": [],
    "norm of the embeddings, by design": [],
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("fault", IN_NUMPY)
def test_functions_and_parameters_of_numpy_suffice(fault: str, flat: bool) -> None:
    assert codes(NumpyGPT(fault, flat).arguments()) == IN_NUMPY[fault]


def test_a_head_of_its_own_is_no_fault() -> None:
    assert codes(NumpyGPT(tied=False).arguments()) == []


def zero_projections(model: PlainGPT) -> PlainGPT:
    for block in model.blocks:
        block.down.weight, block.attention.out.weight = 0 * block.down.weight, 0 * block.attention.out.weight
    return model


class PostNorm(nn.Module):
    """A block that normalises after the addition, by design."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def __call__(self, x: mx.array) -> mx.array:
        x = self.block.ln_1(x + self.block.attention(x))
        return self.block.ln_2(x + self.block.down(nn.gelu(self.block.up(x))))


def post_norm(model: PlainGPT) -> PlainGPT:
    model.blocks = [PostNorm(block) for block in model.blocks]
    return model


def in_bfloat16(model: PlainGPT) -> PlainGPT:
    model.set_dtype(mx.bfloat16)
    return model


def in_four_bits(model: PlainGPT) -> PlainGPT:
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, m: isinstance(m, nn.Linear))
    return model


SOUND: dict[str, Any] = {
    "projections of zeros": lambda: zero_projections(PlainGPT()),
    "norm after addition": lambda: post_norm(PlainGPT()),
    "bfloat16": lambda: in_bfloat16(PlainGPT()),
    "four bits": lambda: in_four_bits(PlainGPT()),
    "rotary, RMSNorm": lambda: PlainGPT(PlainConfig(rope=True, rms=True, tied=False)),
    "dropout": lambda: PlainGPT(PlainConfig(dropout=0.2)),
    "two tokens, context of 5": lambda: PlainGPT(PlainConfig(vocab_size=2, n_positions=5)),
    "this package's": lambda: GPT(GPTConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_module_has_no_finding_and_stays_as_it_was(name: str) -> None:
    model = SOUND[name]()
    before, kinds = dict(tree_flatten(model.parameters())), [type(one) for one in model.modules()]
    assert codes({"forward": model}) == []
    after = dict(tree_flatten(model.parameters()))
    assert all(before[name].dtype == after[name].dtype and mx.array_equal(before[name], after[name]) for name in before)
    assert [type(one) for one in model.modules()] == kinds


def test_computation_that_half_precision_spoils_is_named() -> None:
    class Offset(PlainGPT):
        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + 100.0 - 100.0  # rounds to multiples of 0.5

    assert codes({"forward": in_bfloat16(Offset())}) == ["precision-loss"]


def test_units_that_are_cut_off_from_the_gradient_are_not_dead() -> None:
    base = Base(0)
    given, hidden = base.arguments(), 4 * base.config.width

    def gradient(x: Any, y: Any) -> dict[str, Any]:
        return {name: array * (hidden not in array.shape) for name, array in base.arguments()["gradient"](x, y).items()}

    assert codes({**given, "gradient": gradient}) == []


@pytest.mark.parity
@pytest.mark.parametrize("fault", ["heads-mixed-up", "attends-over-heads", "residual-after-norm", ""])
def test_modules_of_torch_are_looked_into_and_stay_as_they_were(fault: str) -> None:
    pytest.importorskip("torch")
    from helpers.torch_gpt import TorchGPT

    model = TorchGPT(PlainConfig(), {fault})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert codes({"forward": model}) == [fault.replace("attends-over-heads", "heads-mixed-up")] * bool(fault)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert not any("forward" in vars(one) for one in model.modules())
