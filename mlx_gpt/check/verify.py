"""Check that a model computes what its files specify. ``verify`` yields every check with its measured value.

It compares the model, as ``store`` loaded it, with the folder it was loaded from, read independently.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.check.against_transformers import check_against_transformers
from mlx_gpt.check.hub_folder import CONV1D, HubFolder
from mlx_gpt.check.layers import Comparison, compare, max_per_token
from mlx_gpt.check.published import KnownModel, check_published, known_models
from mlx_gpt.check.reference import Array
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.device import on_cpu, without_compiler_dialog
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.convert import hub_shapes
from mlx_gpt.store.folder import convert, load_source
from mlx_gpt.store.huggingface import HUB
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

RANDOM = "random tokens"
TEXT = (
    "Every evening the keeper of the lighthouse counted the ships that came home. On the third of May she counted "
    "1,204 steps instead, up and down again: the lamp was dark, and nobody knew why. “It’s only a fuse,” said Jonas."
)


def verify(
    model: GPT,
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    name: str | None = None,
    tokens: int | None = None,
    models: dict[str, KnownModel] | None = None,
) -> Iterator[Check]:
    """Yield all checks; the model is right if none has ``holds == False``.

    ``name``: the hub id that the model has, or should have. ``tokens``: the length of the longest prompt, by default
    the full context. ``models``: published values, by default the package's. Raises ``ModelFolderError`` for a folder
    without float weights in safetensors.
    """
    folder = HubFolder(path)
    yield from check_weights(model, folder)
    prompts, tolerances = make_prompts(tokenizer, model, tokens), {}
    for what, ids in prompts.items():
        comparison = compare(model, folder, ids)
        tolerances[what] = comparison.logits.tolerance
        yield from report(what, comparison)
    ids, tolerance = prompts[RANDOM], tolerances[RANDOM]
    yield from check_structure(model, ids, tolerance)
    yield from check_tokenizer(tokenizer, folder, model.config.vocab_size)
    yield check_devices(model, ids, tolerance)
    yield from check_against_transformers(model, tokenizer, folder, ids, tolerance)
    yield from check_published(model, tokenizer, folder, name, known_models() if models is None else models)


@contextmanager
def loaded(name: str, revision: str | None = None) -> Iterator[tuple[GPT, Tokenizer, Path]]:
    """Yield a model, its tokenizer, and a folder for the reference, which reads the hub's layout only.

    It is the model's own, or else a temporary one that ``convert`` writes. Raises ``ModelFolderError``.
    """
    source = find_source(name, revision)
    source.require_floats("verify")
    names = {tensor.removeprefix("transformer.") for tensor in source.weights}
    is_hub = source.kind == HUB and not source.is_linear and hub_shapes(source.config).keys() <= names
    model, tokenizer = load_source(source)
    if is_hub:
        yield model, tokenizer, source.folder
        return
    with TemporaryDirectory() as temporary:
        convert(find_source(name, revision), Path(temporary, "model"))
        yield model, tokenizer, Path(temporary, "model")


def make_prompts(tokenizer: Tokenizer, model: GPT, tokens: int | None) -> dict[str, Array]:
    """Return prompts, ids (T,): one token, a text, random ids (mostly rare tokens), and the longest that fits."""
    V, longest = model.config.vocab_size, min(tokens or model.config.n_positions, model.config.n_positions)
    text = np.array([i for i in tokenizer.encode(text_of(tokenizer)) if i < V])
    return {
        "one token": text[:1],
        "a text": text[: min(32, longest)],
        RANDOM: np.random.default_rng(0).integers(0, V, min(64, longest)),
        "a long text": np.resize(text, longest),
    }


def text_of(tokenizer: Tokenizer) -> str:
    """Return a text in the tokenizer's characters: ``TEXT``, or all of nanoGPT's."""
    return "".join(tokenizer.ids) if isinstance(tokenizer, CharacterTokenizer) else TEXT


def report(what: str, comparison: Comparison) -> Iterator[Check]:
    """Yield two checks of a prompt: its logits, and the tensor nearest to or beyond its tolerance."""
    logits = comparison.logits
    what = f"{what} ({comparison.n_tokens})"
    remark = f"relative; {logits.error:.1e} absolute, at token {logits.token}"
    yield measured(f"float64: logits, {what}", logits.relative, logits.tolerance, remark)
    wrong = next((tensor for tensor in comparison.tensors if tensor.share > 1), None)
    shown = wrong or max(comparison.tensors, key=lambda tensor: tensor.share)
    remark = (
        f"first wrong: {wrong.name}, at token {wrong.token}" if wrong else f"closest to its tolerance: {shown.name}"
    )
    yield measured(f"float64: layer by layer, {what}", shown.relative, shown.tolerance, remark)


def check_weights(model: GPT, folder: HubFolder) -> Iterator[Check]:
    """Check that parameters equal the files' bit for bit and are finite, and the head is tied as config.json says."""
    different, not_finite = [], []
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in parameters.items():
        stored = folder.read(name, np.float32) if name in folder.tensors else np.zeros(0)
        if not np.array_equal(np.array(weight), stored.T if name.endswith(CONV1D) else stored, equal_nan=True):
            different.append(name)
        if not np.isfinite(np.array(weight)).all() or not np.isfinite(stored).all():
            not_finite.append(name)
    yield measured("weights that differ from the files", len(different), 0, _first(different))
    yield measured("weights with NaN or infinity", len(not_finite), 0, _first(not_finite))
    head = "lm_head.weight" if "lm_head" in model else "wte.weight"
    remark = f"the head is {head}" + ("" if head == folder.head else f", but config.json says {folder.head}")
    yield Check("head tied as in config.json", None, None, head == folder.head, remark)


def check_structure(model: GPT, ids: Array, tolerance: float) -> Iterator[Check]:
    """Check finiteness, causality and the cache; ``tolerance`` is the relative error allowed in logits."""
    V, T, half = model.config.vocab_size, len(ids), len(ids) // 2
    expected = logits(model, ids)
    yield measured("logits with NaN or infinity", int((~np.isfinite(expected)).sum()), 0)

    changed = ids.copy()
    changed[half:] = (changed[half:] + 1) % V
    effect = np.abs(logits(model, changed)[:half] - expected[:half]).max(initial=0)
    yield measured("effect of later tokens on earlier logits", effect, 0, "absolute")

    cache = model.make_cache()
    steps = [step for step in (ids[:half], *np.split(ids[half:], T - half)) if len(step)]  # half, then one by one
    cached = np.concatenate([np.array(model(step[None], cache)[0]) for step in steps])
    yield measured("logits with a cache against without", _relative_error(cached, expected), tolerance, "relative")


def check_tokenizer(tokenizer: Tokenizer, folder: HubFolder, V: int) -> Iterator[Check]:
    """Check that the tokenizer round-trips a text, fits the vocabulary, and has config.json's end-of-text ids."""
    what = "ids of the tokenizer past the vocabulary"
    yield measured(what, max(0, tokenizer.vocab_size - V), 0, f"{tokenizer.vocab_size} ids, {V} embeddings")
    text = text_of(tokenizer)
    same = tokenizer.decode(tokenizer.encode(text, is_start=False)) == text  # without add_prefix_space
    yield Check("round trip of a text through the tokenizer", None, None, same, "the same" if same else "not the same")
    found = folder.settings.get("eos_token_id")
    if found is not None:
        ends = {*found} if isinstance(found, list) else {found}
        remark = f"config.json: {found}, tokenizer: {next(iter(tokenizer.end_ids), 'none')}"
        yield Check("end-of-text id", None, None, ends <= {*tokenizer.specials.values()}, remark)


def check_devices(model: GPT, ids: Array, tolerance: float) -> Check:
    """Compare the logits of the GPU with those of the CPU."""
    what = "GPU against CPU"
    if on_cpu():
        return skipped(what, "no GPU here")
    found = logits(model, ids)
    with without_compiler_dialog(), mx.stream(mx.cpu):
        expected = logits(model, ids)
    return measured(what, _relative_error(found, expected), 2 * tolerance, "relative")


def logits(model: GPT, ids: Array) -> Array:
    """Ids (T,) -> (T, V)."""
    return np.array(model(ids[None])[0])


def as_json(checks: list[Check]) -> str:
    """Format the report as JSON. NaN and infinity, which JSON lacks, are null; such a check does not hold."""

    def number(x: float | None) -> float | None:
        return x if x is not None and isfinite(x) else None

    lines = [vars(check) | {"figure": number(check.figure), "tolerance": number(check.tolerance)} for check in checks]
    return json.dumps(lines, indent=2, ensure_ascii=False, allow_nan=False)


def _relative_error(found: Array, expected: Array) -> float:
    return float((max_per_token(found - expected) / max_per_token(expected)).max())


def _first(names: list[str]) -> str:
    return f"first: {names[0]}" if names else ""
