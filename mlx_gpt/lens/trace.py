"""The forward pass of GPT-2 with every step named, to be read beside the explanation of attention.

It computes what ``mlx_gpt.model`` computes, from the same parameters, without the fused kernels. Each line
``hook(name, x)`` is a place where an activation can be read or replaced. Names, shapes and conventions are those of
TransformerLens (https://github.com/TransformerLensOrg/TransformerLens). Axis letters are those of ``mlx_gpt.model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.hooks import Activations, Edit, Hooks
from mlx_gpt.lens.weights import output_matrices, split_outputs
from mlx_gpt.model.attention import MultiHeadAttention, attention_scores, causal_mask, weighted_values
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.gpt import GPT, as_ids
from mlx_gpt.model.mlp import MLP
from mlx_gpt.model.ops import LayerNorm


def trace(
    model: GPT, tokens: Any, edits: Mapping[str, Edit] | None = None, names: str | Sequence[str] | None = None
) -> tuple[mx.array, Activations]:
    """Return the logits (B, T, V) of ids (B, T), and the activations by their names in TransformerLens.

    ``names`` are names or patterns such as ``blocks.*.attn.hook_pattern``; the default is every activation but those
    that are stored only by name (``names.BY_NAME``, such as ``blocks.0.attn.hook_result``). MLX computes an array when
    its value is needed: one pattern costs only what leads to it.

    ``edits`` maps names or patterns to functions ``(activation, name) -> activation`` of the same shape. The rest of
    the model computes with the edited activation, and that is what is stored, as in TransformerLens. Where several
    match, they are applied in the order of the mapping.

    Dropout is off. Raises ``UsageError`` for an unknown name, with the closest one; for a text that is empty or longer
    than the context; and for an edit that returns another shape or NaN.
    """
    hooks = Hooks(model.config, (edits or {}).items(), names)
    logits = forward(model, tokens, hooks)
    hooks.check()
    return logits, hooks.activations


def forward(model: GPT, tokens: Any, hook: Hooks, cache: Sequence[KVCache] | None = None) -> mx.array:
    """Return the logits of ids (B, T), which follow those that ``cache`` holds: (B, T, V)."""
    tokens = as_ids(tokens, model.config.vocab_size)
    positions = token_positions(model, tokens.shape[1], cache)

    # A token starts as the sum of two vectors: what it is, and where it is.
    embed = hook("hook_embed", model.wte(tokens))  # (B, T, C)
    pos_embed = hook("hook_pos_embed", mx.broadcast_to(model.wpe(positions), embed.shape))  # (B, T, C)

    # The residual stream: every layer reads from it and adds to it.
    x = embed + pos_embed  # (B, T, C)
    for layer, block in enumerate(model.h):
        name = f"blocks.{layer}"
        x = hook(f"{name}.hook_resid_pre", x)
        normalized = layer_norm(block.ln_1, f"{name}.ln1", x, hook)
        attn_out = attention(block.attn, f"{name}.attn", normalized, hook, cache[layer] if cache else None)
        x = hook(f"{name}.hook_resid_mid", x + hook(f"{name}.hook_attn_out", attn_out))
        normalized = layer_norm(block.ln_2, f"{name}.ln2", x, hook)
        mlp_out = mlp(block.mlp, f"{name}.mlp", normalized, hook)
        x = hook(f"{name}.hook_resid_post", x + hook(f"{name}.hook_mlp_out", mlp_out))

    # A logit is the dot product of the last vector with a token's direction in the head.
    return hook("hook_unembed", model.logits(layer_norm(model.ln_f, "ln_final", x, hook)))  # (B, T, V)


def layer_norm(norm: LayerNorm, name: str, x: mx.array, hook: Hooks) -> mx.array:
    """Center each token's vector and divide it by its spread, so that parts read directions: (B, T, C) -> (B, T, C).

    ``hook_normalized`` is before the learned weight and bias, as in TransformerLens 3 (after them in 2, here
    ``hook_out``). It and ``hook_scale`` are float32.
    """
    centered = x.astype(mx.float32) - x.astype(mx.float32).mean(axis=-1, keepdims=True)
    variance = mx.square(centered).mean(axis=-1, keepdims=True)
    scale = hook(f"{name}.hook_scale", mx.sqrt(variance + norm.eps))  # (B, T, 1)
    normalized = hook(f"{name}.hook_normalized", centered / scale)  # (B, T, C)
    return hook(f"{name}.hook_out", (normalized * norm.weight + norm.bias).astype(x.dtype))


def attention(attn: MultiHeadAttention, name: str, x: mx.array, hook: Hooks, cache: KVCache | None) -> mx.array:
    """Move information between tokens; the only part that does: (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    query, key, value = split_outputs(attn.c_attn, 3)

    def project(letter: str, linear: Any) -> mx.array:  # (B, T, C) -> (B, T, H, D)
        of_heads = linear(hook(f"{name}.{letter}.hook_in", x)).reshape(B, T, attn.n_head, -1)
        return hook(f"{name}.hook_{letter}", of_heads)

    q = project("q", query).swapaxes(1, 2)  # queries ask: what each token looks for      (B, H, T, D)
    k = project("k", key).swapaxes(1, 2)  # keys answer: what each token can be found by  (B, H, T, D)
    v = project("v", value).swapaxes(1, 2)  # values: what each token has to give         (B, H, T, D)
    if cache is not None:
        k, v, _ = cache.extend(k, v)  # those of earlier tokens stand before them          (B, H, S, D)

    # The score is how well a key answers a query. A key of the future gets -inf: its weight will be zero.
    mask = causal_mask(T, k.shape[2])  # (T, S)
    scores = mx.where(mask, attention_scores(q, k, attn.scale), -mx.inf)
    scores = hook(f"{name}.hook_attn_scores", scores)  # (B, H, T, S)

    # The pattern weighs: each query shares one unit of attention among the keys.
    pattern = hook(f"{name}.hook_pattern", mx.softmax(scores, axis=-1, precise=True))  # (B, H, T, S), rows sum to 1

    # Values move: a token receives the average of the values, weighted by its row of the pattern.
    z = hook(f"{name}.hook_z", weighted_values(pattern, v).swapaxes(1, 2))  # (B, T, H, D)

    # Each head adds its own vector to the stream; their sum is one product.
    if hook.wants(f"{name}.hook_result"):
        result = hook(f"{name}.hook_result", mx.einsum("bthd,hdc->bthc", z, output_matrices(attn)))  # (B, T, H, C)
        return result.sum(axis=2) + attn.c_proj.bias
    return attn.c_proj(z.reshape(B, T, C))


def mlp(module: MLP, name: str, x: mx.array, hook: Hooks) -> mx.array:
    """Apply the same neurons to each token by itself: (B, T, C) -> (B, T, C)."""
    pre = hook(f"{name}.hook_pre", module.c_fc(x))  # how far each neuron's direction is in the vector  (B, T, inner)
    post = hook(f"{name}.hook_post", module.activation(pre))  # those below zero are nearly switched off (B, T, inner)
    return module.c_proj(post)  # each neuron adds its output vector, times that                         (B, T, C)


def token_positions(model: GPT, T: int, cache: Sequence[KVCache] | None) -> mx.array:
    """Return the positions of T more tokens: (T,). ``UsageError`` for none and for more than the context holds."""
    start = int(cache[0].offset) if cache else 0
    if T == 0:
        raise UsageError("the text is empty; give at least one token")
    if start + T > model.config.n_positions:
        raise UsageError(
            f"the text is {start + T} tokens long and the model's context is {model.config.n_positions}; shorten it"
        )
    return mx.arange(start, start + T)
