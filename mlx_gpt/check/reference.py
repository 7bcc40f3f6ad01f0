"""GPT-2's forward pass in float64 NumPy, written as the papers' formulas: the reference for every other check.

Vaswani et al. 2017, section 3 (attention), with the changes of Radford et al. 2018, section 4.1 (learned positions,
GELU) and 2019, section 2.3 (layer norm moved before each part, one more at the end). It shares no code with the model
in MLX. Shapes are (..., T, C): a batch is optional.

The same functions compute in float32 on request. Their error is the yardstick for tolerances (``layers``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf, pi, sqrt
from typing import Any

import numpy as np

from mlx_gpt.check.hub_folder import HubWeights

Array = np.ndarray
# Products of some NumPy versions on Apple silicon warn of overflow where there is none (numpy issue 28687); infinity
# and NaN in the result are seen by the comparison.
quiet_products = np.errstate(divide="ignore", over="ignore", invalid="ignore")


def gpt2(weights: HubWeights, ids: Array, dtype: Any = np.float64) -> Array:
    """Return the logits (..., T, V) of ids (..., T)."""
    x = embed(weights, ids, dtype)
    for layer in range(weights.settings["n_layer"]):
        x = block(x, weights.block(layer, dtype), weights.settings, layer)["resid_post"]
    return head(x, weights, dtype)["logits"]


def embed(weights: HubWeights, ids: Array, dtype: Any = np.float64) -> Array:
    """Add token and position embeddings: ids (..., T) -> residual stream (..., T, C)."""
    return weights.read("wte.weight", dtype)[ids] + weights.read("wpe.weight", dtype)[: ids.shape[-1]]


@quiet_products
def block(x: Array, w: Mapping[str, Array], settings: Mapping[str, Any], layer: int) -> dict[str, Array]:
    """Return every tensor of a block in the order of computation; ``resid_post`` is its output, (..., T, C)."""
    t: dict[str, Array] = {}
    eps, n_head = settings["layer_norm_epsilon"], settings["n_head"]

    t["ln_1"] = norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)  # (..., T, C)
    qkv = t["ln_1"] @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]  # (..., T, 3C)
    t["attn.q"], t["attn.k"], t["attn.v"] = np.split(qkv, 3, axis=-1)  # (..., T, C) each
    q, k, v = (split_heads(t[name], n_head) for name in ("attn.q", "attn.k", "attn.v"))  # (..., H, T, D)
    scores = q @ k.swapaxes(-1, -2) * scale(q.shape[-1], settings, layer)  # (..., H, T, T)
    past = np.tri(x.shape[-2], dtype=bool)  # the causal mask
    t["attn.pattern"] = softmax(np.where(past, scores, -np.inf))
    t["attn.attended"] = t["attn.pattern"] @ v  # (..., H, T, D)
    t["attn.c_proj"] = merge_heads(t["attn.attended"]) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]  # (..., T, C)
    t["resid_mid"] = x + t["attn.c_proj"]

    t["ln_2"] = norm(t["resid_mid"], w["ln_2.weight"], w["ln_2.bias"], eps)  # (..., T, C)
    t["mlp.c_fc"] = t["ln_2"] @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]  # (..., T, 4C)
    t["mlp.activation"] = ACTIVATIONS[settings["activation_function"]](t["mlp.c_fc"])
    t["mlp.c_proj"] = t["mlp.activation"] @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]  # (..., T, C)
    t["resid_post"] = t["resid_mid"] + t["mlp.c_proj"]
    return t


@quiet_products
def head(x: Array, weights: HubWeights, dtype: Any = np.float64) -> dict[str, Array]:
    """Return the final layer norm (..., T, C) and the logits (..., T, V)."""
    eps = weights.settings["layer_norm_epsilon"]
    ln_f = norm(x, weights.read("ln_f.weight", dtype), weights.read("ln_f.bias", dtype), eps)
    return {"ln_f": ln_f, "logits": ln_f @ weights.read(weights.head, dtype).T}


def norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Layer normalization: mean 0 and variance 1 over the width, then a learned scale and shift (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def scale(D: int, settings: Mapping[str, Any], layer: int) -> float:
    """Return the factor of the attention scores, 1/sqrt(D) by default."""
    by_width = 1 / sqrt(D) if settings["scale_attn_weights"] else 1.0
    return by_width / (layer + 1) if settings["scale_attn_by_inverse_layer_idx"] else by_width


def split_heads(x: Array, n_head: int) -> Array:
    """(..., T, C) -> (..., H, T, D)."""
    return x.reshape(*x.shape[:-1], n_head, -1).swapaxes(-2, -3)


def merge_heads(x: Array) -> Array:
    """(..., H, T, D) -> (..., T, C)."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    exp_scores = np.exp(x - x.max(-1, keepdims=True))
    return exp_scores / exp_scores.sum(-1, keepdims=True)


def gelu_new(x: Array) -> Array:
    """GPT-2's tanh approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def gelu(x: Array) -> Array:
    """The exact GELU: x times the standard normal cumulative distribution function (same paper)."""
    return x * normal_cdf(x)


def normal_cdf(x: Array) -> Array:
    """The standard normal cumulative distribution function."""
    return np.asarray(0.5 * (1 + np.frompyfunc(erf, 1, 1)(x / sqrt(2))), x.dtype)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), for large |x| too."""
    return 0.5 * (1 + np.tanh(x / 2))


def softplus(x: Array) -> Array:
    """log(1 + e^x)."""
    return np.logaddexp(x, 0)


# By the names of transformers (activations.py), those of one formula as one entry.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), gelu_new),
    **dict.fromkeys(("gelu", "gelu_python"), gelu),
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: x.clip(0),
    "relu2": lambda x: x.clip(0) ** 2,
    "relu6": lambda x: x.clip(0, 6),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    **dict.fromkeys(("silu", "swish"), lambda x: x * sigmoid(x)),
    "hardswish": lambda x: x * (x + 3).clip(0, 6) / 6,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "sqrtsoftplus": lambda x: np.sqrt(softplus(x)),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "laplace": lambda x: normal_cdf((x - 0.707107) / 0.282095),
    "linear": lambda x: x,
}
