"""The residual stream: blocks add to it, and do not replace it by a normalised copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.arrays import as_numpy, rms
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

SCALE = 1000.0  # by which a stream is multiplied
FORGOTTEN = 1e-3  # of the logits' standard deviation: below it they have forgotten the scale of the stream
OUTSIDE = "keep the stream outside the norm: x = x + attention(norm_1(x)); x = x + mlp(norm_2(x))"
FEWEST = 4  # matrices of a layer: queries, keys and values in one; output; the MLP's two
GROWTH = 0.1  # of a block's output when the stream grows by SCALE, divided by SCALE
SPREAD = 0.01  # of the output's root mean square between tokens, where it is normalised by design


@check("residual-after-norm", "forward", "parameters", "load_parameters")
def residual_after_norm(case: Case) -> dict[str, Any] | None:
    """The norm replaces the residual stream: x = norm(x), x = x + f(x), where x = x + f(norm(x)) is meant.

    Each block is called by itself, with random parameters, on the stream that it receives, scaled to a root mean square
    of 1, and on 1000 times that. Measured is by how much the output grows, divided by 1000: a pre-norm block has 1, one
    that normalises the stream less than 0.01. A fault below 0.1 in more than half of the blocks. Post-norm blocks,
    which normalise after the addition by design (Vaswani et al. 2017, GPT-1), do not count: their output has the same
    root mean square for every token, within 0.01, once a weight and a bias of the block are undone. A module without a
    residual of its own is not taken for a block: with all matrices zero its output is the same for all tokens.

    A part that replaces the stream, x = f(norm(x)), is found before, from parameters alone: with the matrices of its
    layer zero the logits depend on no token.

    Where blocks cannot be called by themselves, the embeddings are scaled instead, in models with a norm before the
    head. Larger embeddings outweigh what the blocks add, which changes the logits, unless the stream is normalised.
    """
    require_steady(case)
    if finding := stream_lost(case):
        return finding
    module = module_of(case)
    if module is None:
        return scale_forgotten(case)
    parts = {name: part for name, part in named_modules(module) if name}
    blocks = {name: part for name, part in parts.items() if sum(map(is_weight, arrays_of(part))) >= 2}
    listed = {name: block for name, block in blocks.items() if re.search(r"\d$", name)}
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
        "why": f"{', '.join(forgetful)}: for {SCALE:g} times the stream the output grows by {worst:.2g} of that factor",
        "remedy": OUTSIDE,
        "evidence": {"growth": growth},
    }


def stream_lost(case: Case) -> dict[str, Any] | None:
    """Return the finding for layers that replace the stream: with their matrices zero, no token has an effect."""
    values, ids = case.once(generic), generic_ids(case)
    layers = {
        label: matrices
        for label, names in layers_of([*values]).items()
        if len(matrices := [name for name in names if is_matrix(values[name])]) >= FEWEST
    }

    def is_lost(names: list[str]) -> bool:
        with loaded(case, {**values, **{name: np.zeros_like(values[name]) for name in names}}):
            first, second = case.logits(ids), case.logits(others(case, ids[0])[None])
        return largest(between(first, second)) <= EQUAL * max(float(first.std()), 1.0)

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
    """Return the finding for logits that do not change with the scale of the embeddings, apart from their own scale.

    Compared are embeddings of root mean square 10 and 1000, and at 1000 twice the weights of the norms outside the
    blocks, in case one of them normalises the embeddings by design. Other parameters of the blocks must have an effect.
    """
    values = case.once(generic)
    inner = {name for names in layers_of([*values]).values() for name in names}
    sizes = {case.vocab_size, case.n_positions}
    outside = {name: value for name, value in values.items() if name not in inner}
    tables = [name for name, value in outside.items() if value.ndim == 2 and sizes & {*value.shape}]
    width = {size for name in tables for size in values[name].shape} - {case.vocab_size}
    norms = [name for name, value in outside.items() if value.ndim == 1 and {*value.shape} <= width]
    if not (inner and tables and norms):
        raise NotApplicable("a module, or names of parameters that tell embeddings, blocks and the last norm apart")
    ids, outputs = generic_ids(case), []
    heads = {name: np.zeros_like(value) for name, value in values.items() if value.shape == (case.vocab_size,)}
    for scale, outer, blocks in ((10, 1, 1), (SCALE, 1, 1), (SCALE, 2, 1), (SCALE, 1, -2)):
        scaled = {name: scale * values[name] / rms(values[name]) for name in tables}
        changed = {name: blocks * values[name] for name in inner} | {name: outer * values[name] for name in norms}
        with loaded(case, {**values, **heads, **scaled, **changed}):
            logits = case.logits(ids)
        outputs.append((logits - logits.mean(axis=-1, keepdims=True)) / logits.std(axis=-1, keepdims=True))
    *moved, by_blocks = [rms(output - outputs[0]) for output in outputs[1:]]
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
    """Return the growth of the output of each block with a residual, by name; 1 for post-norm blocks."""
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
    for name, (output, scaled) in outputs.items():
        if name in hollow and varies(hollow[name][0]):
            with loaded(case, full):
                vectors = [as_numpy(array) for array in arrays_of(blocks[name]) if array.shape == output.shape[-1:]]
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
            arrays = [as_numpy(output[0] if isinstance(output, (tuple, list)) else output) for output in tries]
            if all(array.shape == tuple(x.shape) and np.isfinite(array).all() for array in arrays):
                outputs[name] = arrays
        except Exception:  # a block that cannot be called by itself is not measured
            outputs.pop(name, None)
        finally:
            busy.pop()
        return call(*arguments, **settings)

    return watch


def same(arguments: Any) -> Any:
    """Return a copy of arguments, so that a cache among them is not extended; the arguments where copying fails."""
    try:
        return copy.deepcopy(arguments)
    except Exception:
        return arguments


def varies(output: np.ndarray) -> bool:
    """Return True if an output (B, T, C) differs between tokens."""
    return rms(output - output.mean(axis=1, keepdims=True)) > 1e-3 * rms(output)


def is_normalised(output: np.ndarray, vectors: list[np.ndarray]) -> bool:
    """Return True if the output's root mean square is equal for all tokens once a weight and a bias are undone."""
    C = output.shape[-1]
    for weight, bias in product([np.ones(C), *vectors], [np.zeros(C), *vectors]):
        if np.abs(weight).min() > 1e-6:
            sizes = np.sqrt(np.square((output - bias) / weight).mean(axis=-1))
            if sizes.std() < SPREAD * sizes.mean():
                return True
    return False
