"""GPT-2's forward pass in float64 NumPy, from the papers alone: what everything else is measured against.

Vaswani et al. 2017, section 3 (attention), with the changes of Radford et al. 2018 (learned positions, GELU) and
2019, section 2.3 (layer norm moved in front of each part, one more at the end). It shares no code with the package
and reads a hub checkpoint as it lies in the file: matrices are (in, out), so that a layer is ``x @ W + b``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


def gpt2(weights: dict[str, Array], config: dict[str, Any], ids: Array) -> tuple[Array, list[Array]]:
    """Logits (B, T, V), and the residual stream (B, T, C) after the embeddings and after each block.

    ``weights``: the hub's tensors, with or without ``transformer.``; ``config``: the hub's config.json.
    """
    w = {name.removeprefix("transformer."): np.asarray(value, np.float64) for name, value in weights.items()}
    ids = np.asarray(ids)
    stream = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    streams = [stream]
    for i in range(config["n_layer"]):
        block = {name.removeprefix(f"h.{i}."): value for name, value in w.items() if name.startswith(f"h.{i}.")}
        stream = stream + attention(norm(stream, block, "ln_1", config), block, config, layer=i)
        stream = stream + mlp(norm(stream, block, "ln_2", config), block, config)
        streams.append(stream)
    head = w["wte.weight"] if config.get("tie_word_embeddings", True) else w["lm_head.weight"]
    return norm(stream, w, "ln_f", config) @ head.T, streams


def norm(x: Array, w: dict[str, Array], name: str, config: dict[str, Any]) -> Array:
    """Layer normalisation: mean 0, variance 1 over the width, then a learned scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config.get("layer_norm_epsilon", 1e-5))
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: Array, w: dict[str, Array], config: dict[str, Any], layer: int) -> Array:
    """Head by head and query by query: no mask is needed where only the past is in the sum."""
    q, k, v = np.split(x @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"], 3, axis=-1)
    width = x.shape[-1] // config["n_head"]
    scale = 1 / math.sqrt(width) if config.get("scale_attn_weights", True) else 1.0
    if config.get("scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    out = np.zeros_like(x)
    for h in range(config["n_head"]):
        mine = slice(h * width, (h + 1) * width)
        for t in range(x.shape[1]):
            past = slice(0, t + 1)
            scores = np.einsum("bd,bsd->bs", q[:, t, mine], k[:, past, mine]) * scale
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            out[:, t, mine] = np.einsum("bs,bsd->bd", shares, v[:, past, mine])
    return out @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]


def mlp(x: Array, w: dict[str, Array], config: dict[str, Any]) -> Array:
    """Two layers with a GELU between them: the tanh form of the released model, or the exact one."""
    x = x @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
    if config.get("activation_function", "gelu_new") == "gelu_new":
        x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
