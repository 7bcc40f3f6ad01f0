"""Is what this model computes what its files say? Every check that can be made here, each with its figure.

``verify`` is given the model, as it was loaded, and the folder it was loaded from; the two meet nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import isfinite

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.check.against_transformers import check_against_transformers
from mlx_gpt.check.hub_folder import CONV1D, HubFolder
from mlx_gpt.check.layers import Comparison, by_token, compare
from mlx_gpt.check.published import Known, check_published, tables
from mlx_gpt.check.reference import Array
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.device import on_cpu
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

RANDOM = "random tokens"
TEXT = (
    "Every evening the keeper of the lighthouse counted the ships that came home. On the third of May she counted "
    "1,204 steps instead, up and down again: the lamp was dark, and nobody knew why. “It’s only a fuse,” said Jonas."
)


def verify(
    model: GPT,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    name: str | None = None,
    tokens: int | None = None,
    known: dict[str, Known] | None = None,
) -> Iterator[Check]:
    """All checks, one after the other; the model is right if none of them has ``holds == False``.

    ``name``: the hub id that the model has, or should have. ``tokens``: the longest prompt, the full context if None.
    ``known``: published figures, those of the package if None. Raises ``ModelFolderError`` for a folder that holds no
    float weights in safetensors.
    """
    source = HubFolder(folder)
    yield from check_weights(model, source)
    tried, allowed = prompts(tokenizer, model, tokens), {}
    for what, ids in tried.items():
        comparison = compare(model, source, ids)
        allowed[what] = comparison.logits.tolerance
        yield from report(what, comparison)
    ids, tolerance = tried[RANDOM], allowed[RANDOM]
    yield from check_structure(model, tokenizer, source, ids, tolerance)
    yield check_devices(model, ids, tolerance)
    yield from check_against_transformers(model, tokenizer, source, ids, tolerance)
    yield from check_published(model, tokenizer, source, name, tables() if known is None else known)


def prompts(tokenizer: Tokenizer, model: GPT, tokens: int | None) -> dict[str, Array]:
    """Ids (T,) to try: one token, a text, random ids of which most are rare, and the longest that fits."""
    V, longest = model.config.vocab_size, min(tokens or model.config.n_positions, model.config.n_positions)
    text = np.array([i for i in tokenizer.encode(TEXT) if i < V])
    return {
        "one token": text[:1],
        "a text": text[: min(32, longest)],
        RANDOM: np.random.default_rng(0).integers(0, V, min(64, longest)),
        "a long text": np.resize(text, longest),
    }


def report(what: str, comparison: Comparison) -> Iterator[Check]:
    """Two lines of a prompt: the logits, and the way there."""
    logits, wrong = comparison.logits, comparison.first_wrong
    what = f"{what} ({comparison.n_tokens})"
    remark = f"relative; {logits.error:.1e} absolute, at token {logits.token}"
    yield measured(f"float64: logits, {what}", logits.relative, logits.tolerance, remark)
    shown = wrong or max(comparison.tensors, key=lambda tensor: tensor.share)
    remark = f"first wrong: {wrong.name}, at token {wrong.token}" if wrong else f"nearest to it: {shown.name}"
    yield measured(f"float64: layer by layer, {what}", shown.relative, shown.tolerance, remark)


def check_weights(model: GPT, source: HubFolder) -> Iterator[Check]:
    """Every parameter bit for bit as the files have it, every number a number, and the head tied or not as they say."""
    differ, broken = [], []
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in parameters.items():
        stored = source.read(name, np.float32) if name in source.tensors else np.zeros(0)
        if not np.array_equal(np.array(weight), stored.T if name.endswith(CONV1D) else stored, equal_nan=True):
            differ.append(name)
        if not np.isfinite(np.array(weight)).all() or not np.isfinite(stored).all():
            broken.append(name)
    yield measured("weights other than in the files", len(differ), 0, _first(differ))
    yield measured("weights with NaN or infinity", len(broken), 0, _first(broken))
    head = "lm_head.weight" if "lm_head" in model else "wte.weight"
    remark = f"the head is {head}" + ("" if head == source.head else f", but config.json says {source.head}")
    yield Check("head tied as in config.json", None, None, head == source.head, remark)


def check_structure(
    model: GPT, tokenizer: Tokenizer, source: HubFolder, ids: Array, tolerance: float
) -> Iterator[Check]:
    """What holds for every GPT-2, whatever its weights; ``tolerance`` is what logits may be off, relative."""
    V, T, half = model.config.vocab_size, len(ids), len(ids) // 2
    whole = logits(model, ids)
    yield measured("logits with NaN or infinity", int((~np.isfinite(whole)).sum()), 0)

    other = ids.copy()
    other[half:] = (other[half:] + 1) % V
    seen = np.abs(logits(model, other)[:half] - whole[:half]).max(initial=0)
    yield measured("a change of the future, seen before it", seen, 0, "absolute")

    cache = model.make_cache()
    steps = [step for step in (ids[:half], *np.split(ids[half:], T - half)) if len(step)]  # half, then one by one
    cached = np.concatenate([np.array(model(step[None], cache)[0]) for step in steps])
    yield measured("cached, against all at once", _relative(cached, whole), tolerance, "relative")

    yield from check_tokenizer(tokenizer, source, V)


def check_tokenizer(tokenizer: Tokenizer, source: HubFolder, V: int) -> Iterator[Check]:
    """A text survives it, no id is past the vocabulary, and the end of a text is the one that config.json names."""
    what = "ids of the tokenizer past the vocabulary"
    yield measured(what, max(0, tokenizer.vocab_size - V), 0, f"{tokenizer.vocab_size} ids, {V} embeddings")
    back = tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    yield Check("a text, encoded and decoded", None, None, back, "is itself" if back else "is another")
    end = source.settings.get("eos_token_id")
    if end is not None:
        remark = f"config.json: {end}, tokenizer: {tokenizer.eot_id}"
        yield Check("id of the end of a text", None, None, end == tokenizer.eot_id, remark)


def check_devices(model: GPT, ids: Array, tolerance: float) -> Check:
    """The same logits on the CPU as on the GPU."""
    what = "GPU against CPU"
    if on_cpu():
        return skipped(what, "no GPU here")
    found = logits(model, ids)
    with mx.stream(mx.cpu):
        expected = logits(model, ids)
    return measured(what, _relative(found, expected), 2 * tolerance, "relative")


def logits(model: GPT, ids: Array) -> Array:
    """Ids (T,) -> (T, V)."""
    return np.array(model(ids[None])[0])


def as_json(checks: list[Check]) -> str:
    """The report for programs. What is no number, and JSON has none such, is null, and does not hold."""

    def number(x: float | None) -> float | None:
        return x if x is not None and isfinite(x) else None

    lines = [vars(check) | {"figure": number(check.figure), "tolerance": number(check.tolerance)} for check in checks]
    return json.dumps(lines, indent=2, ensure_ascii=False, allow_nan=False)


def _relative(found: Array, expected: Array) -> float:
    return float((by_token(found - expected) / by_token(expected)).max())


def _first(names: list[str]) -> str:
    return f"first: {names[0]}" if names else ""
