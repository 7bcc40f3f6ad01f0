"""GPT-2's forward pass in NumPy and float64, told as the papers tell it: what everything else is measured against.

Vaswani et al. 2017, section 3 (attention), with the changes of Radford et al. 2018, section 4.1 (learned positions,
GELU) and 2019, section 2.3 (each norm in front of its part, one more at the end). It shares no code with the model in
MLX, reads the files by itself (``source``), and is written for one text at a time: T tokens, no batch.

The same functions compute in float32 when they are asked to. That is no second truth but a ruler: how far float32
takes these weights, on these tokens, from the truth (``layers``).
"""

from __future__ import annotations

from math import erf, pi, sqrt
from typing import Any

import numpy as np

from mlx_gpt.check.source import Source

Array = np.ndarray


def gpt2(source: Source, ids: Array, dtype: Any = np.float64) -> Array:
    """The logits of the next token after each token: ids (T,) -> (T, V)."""
    x = embed(source, ids, dtype)
    for layer in range(source.settings["n_layer"]):
        x = block(x, source.block(layer, dtype), source.settings, layer)["resid_post"]
    return head(x, source, dtype)["logits"]


def embed(source: Source, ids: Array, dtype: Any = np.float64) -> Array:
    """What a token is, plus where it stands: ids (T,) -> the residual stream (T, C)."""
    return source.read("wte.weight", dtype)[ids] + source.read("wpe.weight", dtype)[: len(ids)]


def block(x: Array, w: dict[str, Array], settings: dict[str, Any], layer: int) -> dict[str, Array]:
    """Every tensor of a block, in the order in which they come about; the last is the stream after it, (T, C)."""
    t: dict[str, Array] = {}
    eps, n_head = settings["layer_norm_epsilon"], settings["n_head"]

    # Attention: every token asks, every earlier one answers.
    t["ln_1"] = norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)  # (T, C)
    qkv = t["ln_1"] @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]  # (T, 3C)
    t["attn.q"], t["attn.k"], t["attn.v"] = np.split(qkv, 3, axis=-1)  # (T, C) each
    q, k, v = (heads(t[name], n_head) for name in ("attn.q", "attn.k", "attn.v"))  # (H, T, D)
    scores = q @ k.swapaxes(-1, -2) * scale(q.shape[-1], settings, layer)  # (H, T, T)
    t["attn.pattern"] = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))  # the future has no weight
    t["attn.moved"] = t["attn.pattern"] @ v  # (H, T, D)
    t["attn.c_proj"] = side_by_side(t["attn.moved"]) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]  # (T, C)
    t["resid_mid"] = x + t["attn.c_proj"]

    # MLP: every token thinks about what it has heard.
    t["ln_2"] = norm(t["resid_mid"], w["ln_2.weight"], w["ln_2.bias"], eps)  # (T, C)
    t["mlp.c_fc"] = t["ln_2"] @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]  # (T, 4C)
    t["mlp.activation"] = gelu_new(t["mlp.c_fc"]) if is_tanh(settings) else gelu(t["mlp.c_fc"])
    t["mlp.c_proj"] = t["mlp.activation"] @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]  # (T, C)
    t["resid_post"] = t["resid_mid"] + t["mlp.c_proj"]
    return t


def head(x: Array, source: Source, dtype: Any = np.float64) -> dict[str, Array]:
    """The last norm, and each position compared with every token's embedding: (T, C) -> (T, V)."""
    eps = source.settings["layer_norm_epsilon"]
    ln_f = norm(x, source.read("ln_f.weight", dtype), source.read("ln_f.bias", dtype), eps)
    return {"ln_f": ln_f, "logits": ln_f @ source.read(source.head, dtype).T}


def norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Mean 0 and variance 1 over the width, then a learned scale and shift (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def scale(D: int, settings: dict[str, Any], layer: int) -> float:
    """What scores are multiplied by: 1/sqrt(D), unless the settings say otherwise."""
    by_width = 1 / sqrt(D) if settings["scale_attn_weights"] else 1.0
    return by_width / (layer + 1) if settings["scale_attn_by_inverse_layer_idx"] else by_width


def heads(x: Array, n_head: int) -> Array:
    """Each head its share of the width: (T, C) -> (H, T, D)."""
    return x.reshape(len(x), n_head, -1).swapaxes(0, 1)


def side_by_side(x: Array) -> Array:
    """The way back: (H, T, D) -> (T, C)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def softmax(x: Array) -> Array:
    """exp(x), made to sum to one along the last axis."""
    odds = np.exp(x - x.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def is_tanh(settings: dict[str, Any]) -> bool:
    return settings["activation_function"] == "gelu_new"


def gelu_new(x: Array) -> Array:
    """GPT-2's GELU, by tanh (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def gelu(x: Array) -> Array:
    """The exact GELU: x times the share of a normal distribution that lies below x."""
    return 0.5 * x * (1 + np.asarray(np.frompyfunc(erf, 1, 1)(x / sqrt(2)), x.dtype))
