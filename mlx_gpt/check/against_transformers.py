"""Compare a model with ``transformers``, if installed: logits, a greedy continuation, gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.check.hub_folder import CONV1D, HubFolder
from mlx_gpt.check.layers import FACTOR, FLOOR, ULP, max_per_token
from mlx_gpt.check.reference import Array
from mlx_gpt.check.result import Check, measured, skipped
from mlx_gpt.errors import MLXGPTError
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.loss import mean_loss

GRADIENT_BYTES = 30  # per parameter: theirs twice in float32 and twice in float64, and ours
MAX_TOKENS = 32  # of the greedy continuation


def check_against_transformers(
    model: GPT, tokenizer: Tokenizer, folder: HubFolder, ids: Array, tolerance: float
) -> Iterator[Check]:
    """Yield the checks on ids (T,); ``tolerance`` is the relative error allowed in logits."""
    if not (find_spec("torch") and find_spec("transformers")):
        yield skipped("against transformers", "not installed: pip install 'mlx-gpt[parity]'")
        return
    try:
        theirs = load_transformers(folder)
    except Exception as error:  # of any kind, from the other library
        yield _failed("against transformers", f"it cannot open the folder: {_first_line(error)}")
        return
    parts: dict[str, Callable[[], Check]] = {
        "logits": lambda: check_logits(model, theirs, ids, tolerance),
        "greedy": lambda: check_greedy(model, tokenizer, theirs, ids, tolerance),
        "gradients": lambda: check_gradients(model, theirs, ids),
    }
    for what, check in parts.items():
        try:
            yield check()
        except MLXGPTError:
            raise
        except Exception as error:
            yield _failed(f"transformers: {what}", f"it does not compute this model: {_first_line(error)}")


def load_transformers(folder: HubFolder) -> Any:
    import torch
    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    settings["reorder_and_upcast_attn"] = False  # it only rounds otherwise, and transformers 5 fails with it
    return GPT2LMHeadModel.from_pretrained(folder.folder, **settings).eval()


def their_logits(theirs: Any, ids: Any) -> Array:
    """Ids (T,) -> logits (T, V)."""
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(np.asarray(ids)[None], dtype=torch.int64)).logits[0].double().numpy()


def check_logits(model: GPT, theirs: Any, ids: Array, tolerance: float) -> Check:
    """Both models round, so twice the tolerance is allowed."""
    expected = their_logits(theirs, ids)
    error = max_per_token(np.array(model(ids[None])[0]) - expected)
    relative = error / max_per_token(expected)
    remark = f"relative; {error.max():.1e} absolute"
    return measured(f"transformers: logits, {len(ids)} tokens", relative.max(), 2 * tolerance, remark)


def check_greedy(model: GPT, tokenizer: Tokenizer, theirs: Any, ids: Array, tolerance: float) -> Check:
    """Compare greedy continuations, which may differ only where two tokens are equally probable up to rounding."""
    import torch

    P, what = model.config.n_positions, f"transformers: greedy, up to {MAX_TOKENS} tokens"
    prompt = ids[: max(1, P - MAX_TOKENS)]
    if len(prompt) >= P:
        return skipped(what, "the context has no room for a continuation")
    n = min(MAX_TOKENS, P - len(prompt))
    ours = list(generate_tokens(model, tokenizer, prompt.tolist(), temperature=0, max_tokens=n))
    if len(ours) < n:  # it ended with an end token, which generate_tokens leaves out
        best = int(np.argmax(their_logits(theirs, [*prompt, *ours])[-1]))
        ours.append(best if best in tokenizer.end_ids else tokenizer.eot_id)
    padding = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None  # ids without a token
    batch = torch.tensor(prompt[None], dtype=torch.int64)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": len(ours), "suppress_tokens": padding}
    settings |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    output = theirs.generate(batch, attention_mask=torch.ones_like(batch), **settings)[0].tolist()
    expected = output[len(prompt) :]
    wrong = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b), None)
    if wrong is None:
        return measured(what, 0, 0, f"{len(ours)} the same: {tokenizer.decode(ours[:8])!r}…")
    last = their_logits(theirs, [*prompt, *ours[:wrong]])[-1]
    gap = (last[expected[wrong]] - last[ours[wrong]]) / np.abs(last).max()
    remark = f"token {wrong + 1} is {ours[wrong]}, theirs {expected[wrong]}; the difference of their logits, relative"
    return measured(what, gap, 2 * tolerance, remark)


def check_gradients(model: GPT, theirs: Any, ids: Array) -> Check:
    """Compare the gradients of the loss: the largest error of a parameter, relative to its largest gradient.

    As in ``layers``, the reference is their gradient in float64 and the tolerance a multiple of their error in float32.
    Leaves ``theirs`` in float64. Measured on the same random models: at most 0.62 of the tolerance.
    """
    what, need = "transformers: gradients", GRADIENT_BYTES * model.n_parameters
    if len(ids) < 2:
        return skipped(what, "one token has no loss")
    if need > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        return skipped(what, f"needs {need / 1e9:.0f} GB of memory, this machine has {memory / 1e9:.0f}")
    x, y = mx.array(ids[None, :-1]), mx.array(ids[None, 1:])
    _, tree = nn.value_and_grad(model, lambda: mean_loss(model(x), y))()
    ours: dict[str, mx.array] = dict(tree_flatten(tree))
    float32, exact = their_gradients(theirs, ids), their_gradients(theirs.double(), ids)

    def error(found: Any, name: str) -> float:
        return float(np.abs(np.array(found) - exact[name]).max() / (np.abs(exact[name]).max() or 1))

    errors = {name: error(part.T if name.endswith(CONV1D) else part, name) for name, part in ours.items()}
    tolerance = FACTOR * max(error(part, name) for name, part in float32.items()) + FLOOR * ULP
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return measured(what, errors[worst], tolerance, f"relative; the largest is that of {worst}")


def their_gradients(theirs: Any, ids: Array) -> dict[str, Array]:
    """Return gradients by the hub's names, without ``transformer.``."""
    import torch

    batch = torch.tensor(ids, dtype=torch.int64)
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(batch[None, :-1]).logits[0], batch[1:]).backward()
    return {name.removeprefix("transformer."): p.grad.numpy() for name, p in theirs.named_parameters()}


def _failed(what: str, why: str) -> Check:
    return Check(what, None, None, False, why)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
