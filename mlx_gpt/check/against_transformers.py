"""The same model in ``transformers``, where it is installed: logits, a greedy continuation, gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.check.hub_folder import CONV1D, HubFolder
from mlx_gpt.check.layers import FACTOR, FLOOR, ULP, by_token
from mlx_gpt.check.reference import Array
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss

BYTES = 30  # of memory that a parameter takes while gradients are compared: twice float32, twice float64, and ours
CONTINUED = 32  # tokens


def check_against_transformers(
    model: GPT, tokenizer: Tokenizer, source: HubFolder, ids: Array, tolerance: float
) -> Iterator[Check]:
    """``ids`` (T,) are what to compare on; ``tolerance`` is what logits may be off from the truth, relative."""
    if not (find_spec("torch") and find_spec("transformers")):
        yield skipped("against transformers", "not installed: pip install 'mlx-gpt[parity]'")
        return
    try:
        theirs = their_model(source)
    except Exception as error:  # whatever another library makes of the folder
        line = (str(error).splitlines() or [""])[0]
        yield Check("against transformers", None, None, False, f"it cannot open the folder: {line}")
        return
    yield logits(model, theirs, ids, tolerance)
    yield greedy(model, tokenizer, theirs, ids, tolerance)
    yield gradients(model, theirs, ids)


def their_model(source: HubFolder) -> Any:
    import torch
    from transformers import GPT2LMHeadModel
    from transformers import logging as talk

    talk.set_verbosity_error()
    talk.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(source.folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def their_logits(theirs: Any, ids: Any) -> Array:
    """Ids (T,) -> logits (T, V)."""
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(np.asarray(ids)[None], dtype=torch.int64)).logits[0].double().numpy()


def logits(model: GPT, theirs: Any, ids: Array, tolerance: float) -> Check:
    """Two roundings lie between them, theirs and ours, so twice the tolerance."""
    expected = their_logits(theirs, ids)
    off = by_token(np.array(model(ids[None])[0]) - expected)
    relative = off / by_token(expected)
    remark = f"relative; {off.max():.1e} absolute"
    return measured(f"transformers: logits, {len(ids)} tokens", relative.max(), 2 * tolerance, remark)


def greedy(model: GPT, tokenizer: Tokenizer, theirs: Any, ids: Array, tolerance: float) -> Check:
    """Token by token the same, but where two tokens are so nearly as probable that rounding chooses."""
    import torch

    P, what = model.config.n_positions, f"transformers: greedy, up to {CONTINUED} tokens"
    prompt = ids[: max(1, P - CONTINUED)]
    if len(prompt) >= P:
        return skipped(what, "the model has no room for an answer")
    n = min(CONTINUED, P - len(prompt))
    ours = list(generate_tokens(model, tokenizer, prompt.tolist(), temperature=0, max_tokens=n))
    if len(ours) < n:  # the end of the text, which is not among them
        ours.append(tokenizer.eot_id)
    padding = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None  # ids that are no tokens
    batch = torch.tensor(prompt[None], dtype=torch.int64)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": len(ours), "suppress_tokens": padding}
    settings |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    text = theirs.generate(batch, attention_mask=torch.ones_like(batch), **settings)[0].tolist()
    said = text[len(prompt) :]
    wrong = next((i for i, (a, b) in enumerate(zip(ours, said, strict=True)) if a != b), None)
    if wrong is None:
        return measured(what, 0, 0, f"{len(ours)} the same: {tokenizer.decode(ours[:8])!r}…")
    last = their_logits(theirs, [*prompt, *ours[:wrong]])[-1]
    gap = (last[said[wrong]] - last[ours[wrong]]) / np.abs(last).max()
    remark = f"token {wrong + 1} is {ours[wrong]}, theirs {said[wrong]}; how much less probable ours is, in logits"
    return measured(what, gap, 2 * tolerance, remark)


def gradients(model: GPT, theirs: Any, ids: Array) -> Check:
    """Of the loss, parameter by parameter: the largest error, relative to the parameter's largest gradient.

    The truth is theirs in float64 and the ruler, as in ``layers``, theirs in float32; their model stays in float64.
    Measured on random models as there: ours use at most 0.62 of what is tolerated.
    """
    what, need = "transformers: gradients", BYTES * model.n_parameters
    if len(ids) < 2:
        return skipped(what, "one token has no loss")
    if need > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        return skipped(what, f"they take {need / 1e9:.0f} GB of memory, and here are {memory / 1e9:.0f}")
    x, y = mx.array(ids[None, :-1]), mx.array(ids[None, 1:])
    _, tree = nn.value_and_grad(model, lambda: mean_loss(model(x), y))()
    ours: dict[str, mx.array] = dict(tree_flatten(tree))
    twin, exact = their_gradients(theirs, ids), their_gradients(theirs.double(), ids)

    def off(found: Any, name: str) -> float:
        return float(np.abs(np.array(found) - exact[name]).max() / (np.abs(exact[name]).max() or 1))

    errors = {name: off(part.T if name.endswith(CONV1D) else part, name) for name, part in ours.items()}
    tolerance = FACTOR * max(off(part, name) for name, part in twin.items()) + FLOOR * ULP
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return measured(what, errors[worst], tolerance, f"relative; the largest is that of {worst}")


def their_gradients(theirs: Any, ids: Array) -> dict[str, Array]:
    """By the hub's names, unprefixed."""
    import torch

    batch = torch.tensor(ids, dtype=torch.int64)
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(batch[None, :-1]).logits[0], batch[1:]).backward()
    return {name.removeprefix("transformer."): p.grad.numpy() for name, p in theirs.named_parameters()}
