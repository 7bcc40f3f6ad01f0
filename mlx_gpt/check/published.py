"""What others have published about models that everybody has: logits, texts, losses, and the files' checksums.

A file a model in the folder ``published``, each figure with its source and its tolerance, which is the source's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.errors import UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss, next_token_losses

Known = dict[str, Any]

TABLES = Path(__file__).parent / "published"
CHECKSUM, FIGURES = "checksum of the weights", "published figures"


def tables() -> dict[str, Known]:
    """The known models by name."""
    files = sorted(TABLES.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def check_published(
    model: GPT, tokenizer: Tokenizer, source: HubFolder, name: str | None, known: dict[str, Known]
) -> Iterator[Check]:
    """The checksum, then every figure; ``name`` is what the model is said to be, an id of the hub."""
    digests = {file.name: sha256_of(file) for file in source.files}
    of_name = next((one for one in known.values() if name in one["ids"]), None)
    of_bytes = next((one for one in known.values() if set(digests.values()) & set(one["sha256"].values())), None)
    yield checksum(source, digests, of_name or of_bytes)
    found = of_name or of_bytes
    if found is None:
        yield skipped(FIGURES, f"no known model; if it is meant to be one: --known-as {', '.join(known)}")
    elif model.n_parameters != found["parameters"]:
        what = f"parameters of {found['ids'][0]}"
        yield Check(what, model.n_parameters, found["parameters"], False, "this is another model")
    else:
        if not found["figures"]:
            yield skipped(FIGURES, f"none are known of {found['ids'][0]}")
        for figure in found["figures"]:
            yield compare(model, tokenizer, figure)


def checksum(source: HubFolder, digests: dict[str, str], known: Known | None) -> Check:
    """Whether every byte of the weights is the hub's: by the published sha256, or by the one it was downloaded under.

    The hub's cache names a file by its sha256. A copy that was written anew, without OpenAI's mask buffers, has other
    bytes for the same numbers, and no checksum is known for it.
    """
    expected = {file.name: file.resolve().name for file in source.files}  # a link into the cache
    expected = {file: name for file, name in expected.items() if re.fullmatch("[0-9a-f]{64}", name)}
    if known and any(name.endswith(".attn.bias") for name in source.tensors):
        expected |= known["sha256"]
    if not expected:
        return skipped(CHECKSUM, "none is known for this file")
    wrong = [file for file, digest in expected.items() if digests.get(file) != digest]
    remark = f"sha256 {expected[next(iter(expected))][:12]}…"
    if wrong:
        found = digests.get(wrong[0], "no such file")
        remark = f"{wrong[0]}: expected sha256 {expected[wrong[0]][:12]}…, found {found[:12]}…; download it again"
    return measured(CHECKSUM, len(wrong), 0, remark)


def compare(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> Check:
    """One published figure beside ours."""
    what, expected = f"published: {figure['what']}", figure["values"]
    found: Any = MEASURES[figure["kind"]](model, tokenizer, figure)
    if isinstance(expected, str):
        return Check(what, None, None, found == expected, f"{found!r} ({figure['source']})")
    if all(isinstance(value, int) for value in expected):
        others = sum(a != b for a, b in zip(found, expected, strict=True))
        return measured(what, others, 0, f"other tokens ({figure['source']})")
    off = np.abs(np.array(found, np.float64) - expected)
    if "relative" in figure:
        return measured(what, (off / np.abs(expected)).max(), figure["relative"], f"relative ({figure['source']})")
    return measured(what, off.max(), figure["absolute"], f"absolute ({figure['source']})")


def logits_at(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[float]:
    """Logits of some ids (second of each pair) after some tokens (first)."""
    logits = np.array(model([figure["ids"]])[0])
    return [float(logits[position, i]) for position, i in figure["at"]]


def mean_logit(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[float]:
    return [float(np.array(model([figure["ids"]])).mean(dtype=np.float64))]


def most_probable(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[int]:
    return np.array(model([figure["ids"]])[0]).argmax(-1).tolist()


def log_probabilities(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[float]:
    """Of each token but the first, in nats."""
    ids = figure["ids"]
    return (-np.array(next_token_losses(model([ids[:-1]]), mx.array([ids[1:]]))[0])).tolist()


def loss(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[float]:
    return [-float(np.mean(log_probabilities(model, tokenizer, figure)))]


def greedy_ids(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[int]:
    n = len(figure["values"])
    return _padded(generate_tokens(model, tokenizer, figure["ids"], temperature=0, max_tokens=n), n)


def greedy_text(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> str:
    prompt, n = tokenizer.encode(figure["prompt"]), len(tokenizer.encode(figure["values"]))
    return tokenizer.decode(generate_tokens(model, tokenizer, prompt, temperature=0, max_tokens=n))


def training_losses(model: GPT, tokenizer: Tokenizer, figure: dict[str, Any]) -> list[float]:
    """The loss before each of some steps on one batch; decay on everything, no clipping. The model stays as it was."""
    (B, T), ids = figure["shape"], mx.array(figure["ids"])
    x, y = ids[:-1].reshape(B, T), ids[1:].reshape(B, T)
    settings = {name: figure[name] for name in ("learning_rate", "betas", "eps", "weight_decay")}
    optimizer = optim.AdamW(**settings, bias_correction=True)
    weights, losses = model.parameters(), []
    value_and_grad = nn.value_and_grad(model, lambda: mean_loss(model(x), y))
    try:
        for _ in figure["values"]:
            value, gradient = value_and_grad()
            optimizer.update(model, gradient)
            mx.eval(value, model.parameters(), optimizer.state)
            losses.append(value.item())
    finally:
        model.update(weights)
    return losses


MEASURES = {
    "logits": logits_at,
    "mean logit": mean_logit,
    "most probable": most_probable,
    "log-probabilities": log_probabilities,
    "loss": loss,
    "greedy ids": greedy_ids,
    "greedy text": greedy_text,
    "training losses": training_losses,
}


def checked_name(name: str | None, known: Iterable[str]) -> str | None:
    """``UsageError`` unless a model of this name is known."""
    if name is not None and name not in known:
        raise UsageError(f"--known-as must be one of {', '.join(known)}, not {name!r}")
    return name


def _padded(ids: Iterable[int], n: int) -> list[int]:
    ids = list(ids)
    return ids + [-1] * (n - len(ids))  # the text ended early
