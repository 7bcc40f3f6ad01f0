"""The doctor's exact checks of a forward pass name each planted fault, and pass healthy models."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.design_gpt import Design, DesignGPT
from helpers.plain_cache import PlainCache
from helpers.plain_gpt import PlainAttention, PlainConfig, PlainGPT
from mlx.utils import tree_flatten

from mlx_gpt import GPT, GPTConfig
from mlx_gpt.check.doctor import Report
from mlx_gpt.check.doctor.checks import CHECKS
from mlx_gpt.check.doctor.codes import ORDER
from mlx_gpt.check.doctor.examine import make_case, run_checks

SIZES: list[Any] = [
    PlainConfig(),
    PlainConfig(vocab_size=7, n_positions=16, width=16, layers=1, heads=1),
]
FAULTS = {
    "no-mask": "future-leak",
    "inverted-mask": "future-leak",
    "mask-shifted": "future-leak",
    "weak-mask": "future-leak",
    "no-mask-in-training": "future-leak-in-training",
    "softmax-over-queries": "future-leak",
    "only-itself": "past-ignored",
    "cut": "context-too-short",
    "position-blind": "position-blind",
    "token-blind": "token-blind",
    "softmax-over-batch": "batch-leak",
    "batch-norm": "batch-leak",
    "batch-mean": "batch-leak",  # a row alone is all zeros
    "remembers": "depends-on-earlier-calls",
    "positions-from-the-end": "length-dependent",
    "nan": "non-finite",
}


def examine(forward: Any, **given: Any) -> Report:
    """Return the report of the checks of a forward pass alone."""
    checks = [check for check in CHECKS if ".forward." in check.find.__module__]
    return run_checks(make_case({"forward": forward, **given}), checks)


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings if finding.severity == "fault"]


@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"V{config.vocab_size}-L{config.layers}")
@pytest.mark.parametrize(("fault", "code"), FAULTS.items())
def test_a_planted_fault_is_named(fault: str, code: str, config: PlainConfig) -> None:
    assert codes(examine(PlainGPT(config, {fault}))) == [code]


@pytest.mark.parametrize(("part", "factor"), [("out", 0), ("qkv", 300)])
def test_weights_that_let_no_token_pass_are_no_fault_of_the_forward_pass(part: str, factor: float) -> None:
    model = PlainGPT(PlainConfig(), ())
    for block in model.blocks:  # outputs that are zero at first; a saturated softmax
        layer = getattr(block.attention, part)
        layer.weight = factor * layer.weight
    assert codes(examine(model)) == []


@pytest.mark.parametrize("seed", range(3))
def test_dropout_left_on_is_named(seed: int) -> None:
    model = PlainGPT(PlainConfig(dropout=0.1), {"dropout-left-on"}, seed)
    assert codes(examine(model)) == ["not-deterministic"]


TOGETHER = [
    ("dropout-left-on", "no-mask"),
    ("dropout-left-on", "position-blind"),
    ("weak-mask", "no-mask-in-training"),
    ("no-mask", "cut"),
    ("no-mask", "position-blind"),
    ("batch-norm", "positions-from-the-end"),
    pytest.param(("remembers", "batch-norm"), marks=pytest.mark.slow),
    ("nan", "position-blind", "cut"),
    ("mask-shifted", "batch-norm", "position-blind"),
]


@pytest.mark.parametrize("planted", TOGETHER, ids="+".join)
def test_faults_together_are_all_named_in_the_order_of_repair(planted: tuple[str, ...]) -> None:
    named = {FAULTS.get(fault, "not-deterministic") for fault in planted}
    model = PlainGPT(PlainConfig(dropout=0.1 if "dropout-left-on" in planted else 0.0), {*planted})
    assert codes(examine(model)) == sorted(named, key=ORDER.__getitem__)


NAMES = ["W_Q W_K W_V", "to_q to_k to_v", "attn_q attn_k attn_v", "c_q c_k c_v", "query_key_value"]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("fault", ["uniform", ""])
def test_a_uniform_mean_is_named_whatever_queries_and_keys_are_called(names: str, fault: str) -> None:
    model = PlainGPT(PlainConfig(heads=4), {fault})
    value_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))

    def gradient(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: np.array(value) for name, value in tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1])}
        parts = found.pop("blocks.0.attention.qkv.weight").reshape(3, 4, 8, 32)
        found = {name: value for name, value in found.items() if "qkv" not in name}
        if " " not in names:  # each head's queries, keys and values side by side
            return {**found, f"blocks.0.attention.{names}.weight": parts.swapaxes(0, 1).reshape(96, 32)}
        return found | {
            f"blocks.0.attention.{one}": part.reshape(32, 32) for one, part in zip(names.split(), parts, strict=True)
        }

    given = {"vocab_size": 61, "n_positions": 48, "gradient": gradient}
    assert codes(examine(lambda ids: model(mx.array(ids)), **given)) == (["past-ignored"] if fault else [])


@pytest.mark.parametrize("fault", ["uniform", ""])
def test_a_uniform_mean_is_named_from_the_module_that_forward_calls(fault: str) -> None:
    model = PlainGPT(faults={fault})
    report = examine(lambda ids: model(mx.array(ids)), vocab_size=61, n_positions=48)
    assert codes(report) == (["past-ignored"] if fault else [])


@pytest.mark.parametrize("unused", [True, False])
def test_queries_and_keys_without_gradient_are_named_if_unused_but_not_if_frozen(unused: bool) -> None:
    model = DesignGPT(Design())
    matrices = {name: one for name, one in model.named_modules() if name.endswith(("attention.q", "attention.k"))}
    of_scores = tuple(f"{name}." for name in matrices)
    for one in matrices.values():
        one.weight = one.weight * (not unused)
        one.freeze()
    value_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))

    def load(values: dict[str, mx.array]) -> None:
        kept = [(name, value) for name, value in values.items() if not (unused and name.startswith(of_scores))]
        model.load_weights(kept, strict=False)

    given = {
        "gradient": lambda x, y: dict(tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1])),
        "parameters": lambda: dict(tree_flatten(model.parameters())),
        "load_parameters": load,
    }
    report = examine(lambda ids: model(mx.array(ids)), vocab_size=61, n_positions=48, **given)
    assert codes(report) == (["past-ignored"] if unused else [])


CACHES = {"": [], "no-mask": ["future-leak"], "position-blind": ["position-blind"], "cut": ["context-too-short"]}


@pytest.mark.parametrize("fault", CACHES)
@pytest.mark.parametrize("of_cache", ["", "positions start again", "second token not stored", "not emptied"])
def test_a_wrong_cache_is_named_beside_a_wrong_forward(fault: str, of_cache: str) -> None:
    model = PlainGPT(PlainConfig(), {fault})
    cached = PlainCache(
        {name: np.array(value) for name, value in tree_flatten(model.parameters())}, model.config, of_cache
    )
    assert codes(examine(model, cached=cached)) == CACHES[fault] + (["cache-mismatch"] if of_cache else [])


@pytest.mark.parametrize("bias", ["alibi", "t5", "none", "rotary"])
@pytest.mark.parametrize(("P", "heads", "layers"), [(3, 1, 1), (5, 1, 2), (24, 2, 3), (48, 4, 2)])
def test_positions_relative_to_each_other_are_positions(
    bias: str, P: int, heads: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = PlainAttention.pattern

    def biased(self: PlainAttention, scores: mx.array, T: int) -> mx.array:
        distance = mx.maximum(mx.arange(T)[:, None] - mx.arange(T)[None], 0)
        if bias == "alibi":
            scores = scores - mx.power(2.0, -8 * mx.arange(1, heads + 1) / heads)[:, None, None] * distance
        if bias == "t5":
            table = mx.random.normal((heads, 8), key=mx.random.key(0)) / 2
            scores = scores + table[:, mx.minimum(distance, 7)]
        return pattern(self, scores, T)

    monkeypatch.setattr(PlainAttention, "pattern", biased)
    config = PlainConfig(n_positions=P, heads=heads, layers=layers, rope=bias == "rotary")
    model = PlainGPT(config, {"position-blind"})
    model.pop("wpe", None)
    assert codes(examine(model)) == (["position-blind"] if bias == "none" else [])


HEALTHY: dict[str, Any] = {
    "plain": lambda: PlainGPT(),
    "one layer": lambda: PlainGPT(PlainConfig(layers=1, heads=1)),
    "two tokens": lambda: PlainGPT(PlainConfig(vocab_size=2)),
    "rotary": lambda: PlainGPT(PlainConfig(rope=True, rms=True)),
    "rotary, three layers": lambda: PlainGPT(PlainConfig(rope=True, rms=True, layers=3, width=64)),
    "rotary, post-norm": lambda: DesignGPT(Design(positions="rope", post_norm=True, norm=nn.RMSNorm)),
    "dropout": lambda: PlainGPT(PlainConfig(dropout=0.2)),
    "this package's": lambda: GPT(GPTConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)),
    "bfloat16": lambda: in_bfloat16(PlainGPT()),
    "four bits": lambda: in_four_bits(PlainGPT(PlainConfig(width=64, vocab_size=64))),
    "multi-query, rotary": lambda: DesignGPT(Design(positions="rope", kv_heads=1)),
    "context of 5": lambda: PlainGPT(PlainConfig(n_positions=5)),
}


def in_bfloat16(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.bfloat16)
    return model


def in_four_bits(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, m: isinstance(m, nn.Linear))
    return model


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_fault(name: str) -> None:
    report = examine(HEALTHY[name]())
    assert report.findings == []
    assert report.ok


@pytest.mark.parametrize(
    ("alone", "others", "named"),
    [
        ("position-blind", "", ["row-alone-differs"]),
        ("no-mask", "", ["row-alone-differs"]),
        ("no-mask", "mask-shifted", ["row-alone-differs", "future-leak"]),
    ],
)
def test_what_is_wrong_in_a_row_alone_is_no_fault_of_its_own(alone: str, others: str, named: list[str]) -> None:
    models = PlainGPT(faults={alone}), PlainGPT(faults={others})

    def forward(ids: np.ndarray) -> mx.array:
        return models[len(ids) > 1](mx.array(ids))

    assert codes(examine(forward, vocab_size=61, n_positions=48)) == named


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_in_another_order_are_a_leak_of_the_batch(rows: int) -> None:
    model = PlainGPT()

    def forward(ids: np.ndarray) -> np.ndarray:
        return np.array(model(mx.array(ids)))[::-1] if len(ids) >= rows else model(mx.array(ids))

    assert codes(examine(forward, vocab_size=61, n_positions=48)) == ["batch-leak"]


def test_a_function_that_takes_one_row_is_no_fault() -> None:
    model = PlainGPT()

    def forward(ids: np.ndarray) -> mx.array:
        (row,) = ids
        return model(mx.array(row[None]))

    report = examine(forward, vocab_size=61, n_positions=48)
    assert report.findings == []
    assert {"batch-leak", "row-alone-differs"} <= report.skipped.keys()


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_function_that_changes_its_input_is_named(before: int) -> None:
    model = PlainGPT()

    def forward(ids: np.ndarray) -> mx.array:
        ids[:, :before] = 0  # never read
        logits = model(mx.array(ids))
        ids[:] = 0 if not before else ids
        return logits

    assert codes(examine(forward, vocab_size=61, n_positions=48)) == ["changes-input"]


def fails(ids: np.ndarray) -> Any:
    raise SystemExit("no")


@pytest.mark.parametrize(
    ("forward", "code"),
    [(fails, "raises"), (lambda ids: ids, "wrong-shape"), (lambda ids: None, "wrong-shape")],
)
def test_a_function_that_fails_is_a_finding(forward: Any, code: str) -> None:
    report = examine(forward, vocab_size=61, n_positions=48)
    assert codes(report) == [code]
    assert not report.ok
    report.to_json()
