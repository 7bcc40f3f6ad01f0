"""The weights in the form of the explanation: one matrix per head, vectors multiplied from the left.

Shapes are TransformerLens's. Quantized weights are dequantized.
"""

from __future__ import annotations

from copy import copy

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.errors import UsageError
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.gpt import GPT


def split_outputs(linear: nn.Module, n: int) -> list[nn.Module]:
    """Split a linear layer, quantized or not, into n, each with its share of the outputs. No data is copied."""
    parts = [copy(linear) for _ in range(n)]
    for name, array in linear.parameters().items():
        for part, share in zip(parts, mx.split(array, n), strict=True):
            part[name] = share
    return parts


def dense_weight(layer: nn.Module) -> mx.array:
    """Return the weight of a linear layer or embedding, (out, in) or (V, C), dequantized if necessary."""
    if "scales" not in layer:
        return layer.weight
    mode = {"mode": layer.mode} if hasattr(layer, "mode") else {}
    biases = layer.get("biases")
    return mx.dequantize(layer.weight, layer.scales, biases, group_size=layer.group_size, bits=layer.bits, **mode)


def n_weights(model: GPT) -> int:
    """Return the number of parameters, of a quantized matrix those that it stands for; a tied head counts once."""
    total = model.n_parameters
    for layer in model.modules():
        if "scales" in layer:
            stored = sum(layer[name].size for name in ("weight", "scales", "biases") if name in layer)
            total += layer.scales.size * layer.group_size - stored
    return total


def input_matrices(attn: MultiHeadAttention) -> tuple[mx.array, mx.array, mx.array]:
    """Return W_Q, W_K and W_V of a layer: (H, C, D) each. A head's query is ``x @ W_Q[h]``, and its bias."""
    q, k, v = (part.reshape(attn.n_head, -1, part.shape[1]) for part in mx.split(dense_weight(attn.c_attn), 3))
    return q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)


def output_matrices(attn: MultiHeadAttention) -> mx.array:
    """Return W_O of a layer: (H, D, C). A head adds ``z @ W_O[h]`` to the residual stream."""
    weight = dense_weight(attn.c_proj)  # (C, H D)
    return weight.T.reshape(attn.n_head, -1, weight.shape[0])


def embedding_matrix(model: GPT) -> mx.array:
    """Return W_E: (V, C), the vector that each token starts with."""
    return dense_weight(model.wte)


def head_matrix(model: GPT) -> mx.array:
    """Return W_U transposed: (V, C), the direction in which each token's logit is read."""
    return dense_weight(model.wte if model.config.tie_word_embeddings else model.lm_head)


def check_head(model: GPT, layer: int, head: int) -> None:
    """Raise ``UsageError`` for a layer or head that the model does not have."""
    for name, value, count in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if not 0 <= value < count:
            raise UsageError(f"{name} must be between 0 and {count - 1}, not {value}")
