"""The residual stream: it runs through every block, and is not replaced by a normalised copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.checks import NotApplicable, check
from mlx_gpt.check.doctor.inside import arrays_of, module_of, named_modules, watched
from mlx_gpt.check.doctor.module_arguments import arguments_of
from mlx_gpt.check.doctor.parameters import (
    Arrays,
    generic,
    generic_ids,
    is_matrix,
    layers_of,
    loaded,
    require_steady,
)
from mlx_gpt.check.doctor.probes import EQUAL, between, largest, others

SCALE = 1000.0
FORGOTTEN = 1e-3  # of the standard deviation of logits
OUTSIDE = "keep the stream outside the norm: x = x + attention(norm_1(x)); x = x + mlp(norm_2(x))"
FEWEST = 4  # matrices of a layer: queries, keys and values in one, output, up, down
GROWTH = 0.1  # of the output for a stream times SCALE, over SCALE
SPREAD = 0.01  # of the output's root mean square between tokens, where it is normalised by design


@check("residual-after-norm", "forward", "parameters", "load_parameters")
def residual_after_norm(case: Case) -> dict[str, Any] | None:
    """The norm replaces the residual stream: x = norm(x), x = x + f(x), where x = x + f(norm(x)) is meant.

    Each block is called by itself on the stream that it receives, brought to a root mean square of 1, and on 1000 times
    that. Measured is the growth of its output over 1000: of a pre-norm block 1, of one that normalises the stream below
    0.01; threshold 0.1, in more than half of the blocks. Parameters are random, so that the branches add something.
    Blocks that normalise after the addition (Vaswani et al. 2017, GPT-1) do so by design: their output is normalised
    itself, that is, with a weight and bias of the block undone, its root mean square varies by less than 0.01 between
    tokens. A module without a residual of its own is no block: with all matrices zero, its output is the same for all
    tokens.

    A part that replaces the stream, x = f(norm(x)), is found first, by parameters alone: with the matrices of its layer
    zero, the logits depend on no token at all.

    Without such blocks the embeddings are scaled: where the norm before the head has weights of its own, that is, in a
    pre-norm model, the logits are the same up to their scale only if the stream is normalised, or not added to.
    """
    require_steady(case)
    if found := stream_lost(case):
        return found
    module = module_of(case)
    if module is None:
        return scale_forgotten(case)
    blocks = {name: one for name, one in named_modules(module) if sum(map(is_weight, arrays_of(one))) >= 2 and name}
    listed = {name: one for name, one in blocks.items() if re.search(r"\d$", name)}
    growth = growths(case, module, listed or blocks)
    if not growth:
        return scale_forgotten(case)
    forgetful = [name for name, size in growth.items() if size < GROWTH]
    if 2 * len(forgetful) <= len(growth):
        return None
    worst = max(growth[name] for name in forgetful)
    return {
        "measured": worst,
        "expected": 1,
        "why": f"{', '.join(forgetful)}: a stream times {SCALE:g} gives {worst:.2g} of the output that it should",
        "remedy": OUTSIDE,
        "evidence": {"growth": growth},
    }


def stream_lost(case: Case) -> dict[str, Any] | None:
    """Set all matrices of the layers to zero, so that only the stream is left, and look for an effect of the tokens."""
    values, ids = case.once(generic), generic_ids(case)
    layers = {
        label: matrices
        for label, names in layers_of([*values]).items()
        if len(matrices := [name for name in names if is_matrix(values[name])]) >= FEWEST
    }

    def is_lost(names: list[str]) -> bool:
        with loaded(case, {**values, **{name: np.zeros_like(values[name]) for name in names}}):
            one, two = case.logits(ids), case.logits(others(case, ids[0])[None])
        return largest(between(one, two)) <= EQUAL * max(float(one.std()), 1.0)

    if not layers or is_lost([]) or not is_lost([name for names in layers.values() for name in names]):
        return None
    if not (lost := [label for label, names in layers.items() if is_lost(names)]):
        return None
    return {
        "measured": lost,
        "expected": [],
        "why": f"with all matrices of {', '.join(lost)} zero the logits depend on no token: a part replaces the "
        "stream, where its output should be added",
        "remedy": OUTSIDE,
        "evidence": {"layers": lost},
    }


def scale_forgotten(case: Case) -> dict[str, Any] | None:
    """Compare normalised logits at embeddings 10 and 1000 times as large, and at the outer norm times 2.

    Outside the blocks a pre-norm model has the norm before the head, of which the logits are linear. A norm of the
    embeddings, which forgets their scale by design, sets the size of the stream beside the branches.
    """
    values = case.once(generic)
    inner = {name for names in layers_of([*values]).values() for name in names}
    sizes = {case.vocab_size, case.n_positions}
    tables = [name for name, one in values.items() if name not in inner and one.ndim == 2 and sizes & {*one.shape}]
    width = {size for name in tables for size in values[name].shape} - {case.vocab_size}
    norms = [name for name, one in values.items() if name not in inner and one.ndim == 1 and {*one.shape} <= width]
    if not (inner and tables and norms):
        raise NotApplicable("module, or parameters of which embeddings, blocks and a norm before the head can be told")
    ids, found = generic_ids(case), []
    heads = {name: np.zeros_like(one) for name, one in values.items() if one.shape == (case.vocab_size,)}
    for scale, outer, blocks in ((10, 1, 1), (SCALE, 1, 1), (SCALE, 2, 1), (SCALE, 1, -2)):
        scaled = {name: scale * values[name] / rms(values[name]) for name in tables}
        changed = {name: blocks * values[name] for name in inner} | {name: outer * values[name] for name in norms}
        with loaded(case, {**values, **heads, **scaled, **changed}):
            logits = case.logits(ids)
        found.append((logits - logits.mean(axis=-1, keepdims=True)) / logits.std(axis=-1, keepdims=True))
    *moved, by_blocks = [rms(one - found[0]) for one in found[1:]]
    if not max(moved) < FORGOTTEN < by_blocks:
        return None
    return {
        "measured": max(moved),
        "expected": f"above {FORGOTTEN:g}",
        "why": f"embeddings 10 and {SCALE:g} times as large give the same logits up to their scale, within "
        f"{max(moved):.2g} of their standard deviation: the stream is normalised itself, or nothing is added to it",
        "remedy": OUTSIDE,
        "evidence": {"tables": tables, "norms": norms},
    }


def is_weight(array: Any) -> bool:
    return len(array.shape) in (2, 3)


def growths(case: Case, module: Any, blocks: dict[str, Any]) -> dict[str, float]:
    """Return the growth of each block that has a residual; 1 for those that normalise their output by design."""
    ids = generic_ids(case)
    forward = arguments_of(module)[0]["forward"] if case.has("module") else case.given["forward"]
    streams: dict[str, Any] = {}

    def probe(values: Arrays) -> dict[str, list[np.ndarray]]:
        outputs: dict[str, list[np.ndarray]] = {}
        with loaded(case, values), watched(blocks, watcher(streams, outputs)):
            case.logits(ids, "forward", forward)
        return outputs

    full = case.once(generic)
    outputs = probe(full)
    hollow = probe({name: np.zeros_like(array) if is_matrix(array) else array for name, array in full.items()})
    growth = {}
    for name, (one, scaled) in outputs.items():
        if name in hollow and varies(hollow[name][0]):
            with loaded(case, full):
                vectors = [as_numpy(array) for array in arrays_of(blocks[name]) if array.shape == one.shape[-1:]]
            growth[name] = 1.0 if is_normalised(scaled, vectors) else rms(scaled) / SCALE
    return growth


def watcher(streams: dict[str, Any], outputs: dict[str, list[np.ndarray]]) -> Callable[..., Any]:
    """Return a watcher that calls each block also on its stream at two scales, and keeps the outputs.

    ``streams`` holds the first stream that each block received, (B, T, C); it is filled where it is empty.
    """
    busy: list[str] = []

    def watch(name: str, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        if busy or name in outputs or not arguments or len(getattr(arguments[0], "shape", ())) != 3:
            return call(*arguments, **settings)
        x = streams.setdefault(name, arguments[0])
        busy.append(name)
        try:
            unit = x / max(rms(as_numpy(x)), 1e-30)
            tries = [call(unit * scale, *same(arguments[1:]), **same(settings)) for scale in (1.0, SCALE)]
            found = [as_numpy(one[0] if isinstance(one, (tuple, list)) else one) for one in tries]
            if all(one.shape == tuple(x.shape) and np.isfinite(one).all() for one in found):
                outputs[name] = found
        except Exception:  # a block that cannot be called by itself is not measured
            outputs.pop(name, None)
        finally:
            busy.pop()
        return call(*arguments, **settings)

    return watch


def same(arguments: Any) -> Any:
    """Return a copy, so that a cache among the arguments is not extended; themselves where they cannot be copied."""
    try:
        return copy.deepcopy(arguments)
    except Exception:
        return arguments


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array.astype(np.float64)).mean()))


def varies(output: np.ndarray) -> bool:
    """True if an output (B, T, C) differs between tokens."""
    return rms(output - output.mean(axis=1, keepdims=True)) > 1e-3 * rms(output)


def is_normalised(output: np.ndarray, vectors: list[np.ndarray]) -> bool:
    """True if the output's root mean square is equal for all tokens once a weight and a bias are undone."""
    C = output.shape[-1]
    for weight, bias in product([np.ones(C), *vectors], [np.zeros(C), *vectors]):
        if np.abs(weight).min() > 1e-6:
            sizes = np.sqrt(np.square((output - bias) / weight).mean(axis=-1))
            if sizes.std() < SPREAD * sizes.mean():
                return True
    return False
