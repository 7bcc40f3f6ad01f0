"""The data of a recorded page: what was traced of some texts, for models that are too large to run in a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.generate.sampler import Vocabulary
from mlx_gpt.lens.attribution import decompose_resid, logit_lens_top
from mlx_gpt.lens.hooks import Activations
from mlx_gpt.lens.page.living import packed
from mlx_gpt.lens.trace import trace
from mlx_gpt.lens.weights import head_matrix, n_weights
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENS = 128  # of a text
SIZE = 4_800_000  # characters of all recordings
LENS, NEXT, TARGETS = 10, 50, 10  # most probable tokens of the logit lens, after a position, and with attributions
ALL_RANKS = 512  # up to this rank, the logits of all tokens after a position are recorded, then those of some
STREAMS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")  # of a layer


def recorded_data(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], name: str) -> dict[str, Any]:
    """Return the data of a recorded page as an object for JSON.

    Of each text up to 128 tokens are recorded, of the first one fewer if the model has so many heads that they would
    take more than 4.8 MB; of the others as many as fit in that.
    """
    recordings: list[dict[str, Any]] = []
    size = 0
    for text in dict.fromkeys(texts):
        recording = fitting(model, tokenizer, text, may_cut=not recordings)
        size += len(recording["blob"])
        if recordings and size > SIZE:
            break
        recordings.append(recording)
    ids = {i for recording in recordings for i in recording.pop("seen")}
    return {
        "kind": "recorded",
        "name": name,
        "parameters": n_weights(model),
        "config": {**asdict(model.config), "inner_dim": model.config.inner_dim},
        "tokenizer": {"kind": "recorded", "tokens": {i: token_text(tokenizer, i) for i in sorted(ids)}},
        "texts": [recording["text"] for recording in recordings],
        "recordings": recordings,
    }


def fitting(model: GPT, tokenizer: Tokenizer, text: str, may_cut: bool) -> dict[str, Any]:
    """Record a text; if ``may_cut``, only its beginning where the whole is too large."""
    ids = tokenizer.encode_prompt(text)
    known = mx.array(Vocabulary(tokenizer, model.config.vocab_size).known.nonzero()[0], mx.int32)
    T = min(len(ids), TOKENS, model.config.n_positions)
    while True:
        recording = record(model, ids[:T], known)
        if len(recording["blob"]) <= SIZE or not may_cut or T == 1:
            return {"text": text if len(ids) == T else tokenizer.decode(ids[:T]), **recording}
        T = T * 3 // 4


def record(model: GPT, ids: list[int], known: mx.array) -> dict[str, Any]:
    """Trace a text; return its ids, the readings that ``js/recorded.js`` shows, and the ids ``seen`` in any of them."""
    logits, activations = trace(model, mx.array([ids], mx.int32))
    top_ids, logprobs = (top[:, 0] for top in logit_lens_top(model, activations, k=LENS))  # (n_layer + 1, T, 10) each
    following = next_tokens(logits[0], known)
    targets = targets_of(following["next_ids"], ids)
    parts, labels = decompose_resid(model, activations, by="head")  # (N, 1, T, C)
    parts = parts[:, 0].astype(mx.float32)
    streams = ["hook_embed", "hook_pos_embed"]
    streams += [f"blocks.{layer}.{stream}" for layer in range(model.config.n_layer) for stream in STREAMS]
    arrays = {
        **scores_of(model, activations),
        "norms": mx.stack([norms(activations[stream][0]) for stream in streams]),
        "part_norms": norms(parts),
        "lens_ids": top_ids.astype(mx.int32),
        "lens_probabilities": mx.exp(logprobs),
        **following,
        "targets": targets,
        "attribution": attributions(model, activations, parts, targets).astype(mx.float16),
    }
    found = {name: np.array(array) for name, array in arrays.items()}
    seen = {int(i) for name in ("lens_ids", "next_ids", "targets") for i in np.unique(found[name])}
    labels = [*labels, "ln_final_bias"]
    return {"ids": ids, "streams": streams, "labels": labels, "seen": seen | {*ids}, **packed(found)}


def scores_of(model: GPT, activations: Activations) -> dict[str, mx.array]:
    """Return the attention scores of allowed keys below each query's largest, (n_layer, H, T (T + 1) / 2), and that.

    So float16 keeps the pattern: a weight changes by at most 2e-4.
    """
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.config.n_layer)]
    scores = np.array(mx.stack([activations[name][0] for name in names]).astype(mx.float32))  # (n_layer, H, T, T)
    largest = scores.max(axis=-1)
    queries, keys = np.tril_indices(scores.shape[-1])
    below = (scores - largest[..., None])[..., queries, keys]
    return {"scores": mx.array(below).astype(mx.float16), "largest_scores": mx.array(largest)}


def next_tokens(logits: mx.array, known: mx.array) -> dict[str, mx.array]:
    """Return the 50 most probable of the ``known`` ids (n) at each position, and how the other logits fall.

    Logits (T, V) are recorded at ``ranks`` (m), as ``gaps`` (T, m - 1) from one to the next in float16. That changes
    none by more than 0.05 % of its distance to the 50th, so the page knows any temperature, top-k and top-p.
    """
    logits = logits.astype(mx.float32)
    allowed = logits[:, known]  # (T, n)
    order = mx.argsort(-allowed, axis=-1)
    ranks = mx.array(ranks_of(known.size), mx.int32)
    descending = mx.take_along_axis(allowed, order, axis=-1)
    recorded = descending[:, ranks]
    return {
        "next_ids": known[order[:, :NEXT]],
        "next_logits": descending[:, :NEXT],
        "next_probabilities": mx.exp(descending[:, :NEXT] - mx.logsumexp(logits, axis=-1, keepdims=True)),
        "ranks": ranks,
        "gaps": (recorded[:, :-1] - recorded[:, 1:]).astype(mx.float16),
    }


def ranks_of(n: int) -> list[int]:
    """Return the ranks that are recorded of n logits: from the 50th on, closer at both ends."""
    ranks, last = [], n - 1
    rank = min(NEXT - 1, last)
    while rank < last:
        ranks.append(rank)
        rank += 1 if rank < ALL_RANKS else max(1, min(rank // 64, (last - rank) // 8))
    return [*ranks, last]


def targets_of(next_ids: mx.array, ids: list[int]) -> mx.array:
    """Return the ids whose logits are attributed at each position: the most probable, and last the one that follows."""
    following = mx.array([*ids[1:], next_ids[-1, 0].item()], mx.int32)
    return mx.concatenate([next_ids[:, :TARGETS], following[:, None]], axis=1)


def attributions(model: GPT, activations: Activations, parts: mx.array, targets: mx.array) -> mx.array:
    """Return what each part and the final bias add to the logits of each position's targets: (T, targets, N + 1).

    As ``attribution.logit_attribution``, which takes one direction for all positions.
    """
    directions = head_matrix(model)[targets].astype(mx.float32)  # (T, targets, C)
    weighted = directions * model.ln_f.weight
    weighted = weighted - weighted.mean(axis=-1, keepdims=True)
    scale = activations["ln_final.hook_scale"][0]  # (T, 1)
    values = mx.einsum("ntc,tkc->tkn", parts, weighted) / scale[:, None]
    return mx.concatenate([values, (directions @ model.ln_f.bias)[..., None]], axis=-1)


def norms(x: mx.array) -> mx.array:
    """(..., C) -> (...)."""
    return mx.linalg.norm(x.astype(mx.float32), axis=-1)


def token_text(tokenizer: Tokenizer, i: int) -> str:
    r"""Return the text of an id, with bytes that are no whole character as ``\xe2``; "" for one that no token has."""
    try:
        return tokenizer.token_bytes(i).decode(errors="backslashreplace")
    except ValueError:
        return ""
