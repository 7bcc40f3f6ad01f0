"""Compare a well-known model with published values: logits, texts, losses, and checksums of the files.

The folder ``published`` has a file per model. Each value has its source, and the tolerance given there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.published_lens import answer_differences, heads_of_a_kind, losses_without_values
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.errors import UsageError
from mlx_gpt.files import sha256_of
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss, next_token_losses

KnownModel = dict[str, Any]

FOLDER = Path(__file__).parent / "published"
CHECKSUM, PUBLISHED = "checksum of the weights", "published values"


def known_models() -> dict[str, KnownModel]:
    """Return the published values of each model, by its name."""
    files = sorted(FOLDER.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def find_known(models: Mapping[str, KnownModel], name: str | None, digests: Mapping[str, str]) -> KnownModel | None:
    """Identify a model by its id, else by the SHA-256 of one of its files (``hash_files``)."""
    by_name = next((model for model in models.values() if name in model["ids"]), None)
    shared = (model for model in models.values() if set(digests.values()) & set(model["sha256"].values()))
    return by_name or next(shared, None)


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its name."""
    return {file.name: sha256_of(file) for file in files}


def check_name(name: str | None, models: Iterable[str]) -> str | None:
    """Return the name of a known model. Raises ``UsageError`` for any other but None."""
    if name is not None and name not in models:
        raise UsageError(f"--known-as must be one of {', '.join(models)}, not {name!r}")
    return name


def check_published(
    model: GPT, tokenizer: Tokenizer, folder: HubFolder, name: str | None, models: Mapping[str, KnownModel]
) -> Iterator[Check]:
    """Check the checksum, then every published value. ``name``: the hub id that the model has, or should have."""
    digests = hash_files(folder.files)
    known = find_known(models, name, digests)
    yield check_checksum(folder, digests, known)
    if known is None:
        yield skipped(PUBLISHED, f"not a known model; if it should be one: --known-as {', '.join(models)}")
    elif model.n_parameters != known["parameters"]:
        what = f"parameters of {known['ids'][0]}"
        yield Check(what, model.n_parameters, known["parameters"], False, "this is another model")
    else:
        if not known["figures"]:
            yield skipped(PUBLISHED, f"none are known of {known['ids'][0]}")
        for entry in known["figures"]:
            yield compare(model, tokenizer, entry)


def check_checksum(folder: HubFolder, digests: Mapping[str, str], known: KnownModel | None) -> Check:
    """Compare the SHA-256 of the weights with the published one, and with the one in the hub's cache.

    The cache names each file by its SHA-256. A copy that was written anew, without OpenAI's mask buffers, has other
    bytes for the same numbers, so it has no known checksum.
    """
    targets = {file.name: file.resolve().name for file in folder.files}  # links into the cache
    expected = {name: target for name, target in targets.items() if re.fullmatch("[0-9a-f]{64}", target)}
    if known and any(name.endswith(".attn.bias") for name in folder.tensors):
        expected |= known["sha256"]
    if not expected:
        return skipped(CHECKSUM, "none is known for this file")
    wrong = [file for file, digest in expected.items() if digests.get(file) != digest]
    remark = f"sha256 {expected[next(iter(expected))][:12]}…"
    if wrong:
        found = digests.get(wrong[0], "no such file")
        remark = f"{wrong[0]}: expected sha256 {expected[wrong[0]][:12]}…, found {found[:12]}…; download it again"
    return measured(CHECKSUM, len(wrong), 0, remark)


def compare(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> Check:
    """Measure what an entry of a file in ``published`` describes, and compare it with the entry's values."""
    what, expected = f"published: {entry['what']}", entry["values"]
    found: Any = MEASURES[entry["kind"]](model, tokenizer, entry)
    if isinstance(expected, str):
        remark = f"{found!r}" if found == expected else f"{found!r} instead of {expected!r}"
        return Check(what, None, None, found == expected, f"{remark} ({entry['source']})")
    if all(isinstance(value, int) for value in expected):
        n_different = sum(a != b for a, b in zip(found, expected, strict=True))
        return measured(what, n_different, 0, f"different tokens ({entry['source']})")
    error = np.abs(np.array(found, np.float64) - expected)
    if "relative" in entry:
        return measured(what, (error / np.abs(expected)).max(), entry["relative"], f"relative ({entry['source']})")
    return measured(what, error.max(), entry["absolute"], f"absolute ({entry['source']})")


def logits_at(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    """Return the logits at ``entry["at"]``: pairs of a position and an id."""
    logits = np.array(model([entry["ids"]])[0])
    return [float(logits[position, i]) for position, i in entry["at"]]


def mean_logit(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    return [float(np.array(model([entry["ids"]])).mean(dtype=np.float64))]


def most_probable(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[int]:
    return np.array(model([entry["ids"]])[0]).argmax(-1).tolist()


def logprobs(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    """Return the logprob of each token but the first, in nats."""
    ids = entry["ids"]
    return (-np.array(next_token_losses(model([ids[:-1]]), mx.array([ids[1:]]))[0])).tolist()


def loss(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    return [-float(np.mean(logprobs(model, tokenizer, entry)))]


def greedy_ids(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[int]:
    """Generate as many ids as there are values, padded with -1 after the end of the text."""
    n = len(entry["values"])
    ids = list(generate_tokens(model, tokenizer, entry["ids"], temperature=0, max_tokens=n))
    return ids + [-1] * (n - len(ids))


def greedy_text(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> str:
    prompt, n = tokenizer.encode(entry["prompt"]), len(tokenizer.encode(entry["values"]))
    return tokenizer.decode(generate_tokens(model, tokenizer, prompt, temperature=0, max_tokens=n))


def training_losses(model: GPT, tokenizer: Tokenizer, entry: dict[str, Any]) -> list[float]:
    """Return the loss before each of several AdamW steps on one batch, then restore the weights.

    Weight decay applies to all parameters; gradients are not clipped.
    """
    (B, T), ids = entry["shape"], mx.array(entry["ids"])
    x, y = ids[:-1].reshape(B, T), ids[1:].reshape(B, T)
    settings = {name: entry[name] for name in ("learning_rate", "betas", "eps", "weight_decay")}
    optimizer = optim.AdamW(**settings, bias_correction=True)
    weights, losses = model.parameters(), []
    value_and_grad = nn.value_and_grad(model, lambda: mean_loss(model(x), y))
    try:
        for _ in entry["values"]:
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
    "log-probabilities": logprobs,
    "loss": loss,
    "greedy ids": greedy_ids,
    "greedy text": greedy_text,
    "training losses": training_losses,
    "answer difference": answer_differences,
    "losses without values": losses_without_values,
    "heads": heads_of_a_kind,
}
