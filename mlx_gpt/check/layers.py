"""Compare a model with the reference tensor by tensor, to name the layer and tensor of a fault.

Each block starts from the reference's residual stream, so an error shows in the block that makes it and does not
propagate. The compared tensors come from the model's own modules; ``resid_post`` is the output of the whole block.

The error allowed in float32 depends on the weights and tokens, so it is measured on them: it is a multiple of the error
of the reference computed in float32. Errors are taken per token, relative to the largest value there (in GPT-2 the
first token's residual stream reaches thousands, the others' below a hundred). The tolerance of a tensor is FACTOR times
the largest such error, plus FLOOR roundings of 2^-24 for small tensors in which NumPy happens to be exact.

Measured on random models, N(0, 0.02) and N(0, 0.1), 16 to 1024 wide, 2 to 24 layers, 1 to 128 tokens: tensors use at
most 0.20 of the tolerance with OpenBLAS and 0.32 with the reference BLAS of MLX's Linux wheel, which sums term by term;
the logits of the whole model 0.10 and 0.17. Not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.check import reference
from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import Array
from mlx_gpt.model.attention import attention_pattern, attention_scores, causal_mask, split_heads, weighted_values
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT

FACTOR, FLOOR = 16, 16
ULP = 2.0**-24


@dataclass(frozen=True)
class Difference:
    """The error of a tensor at the token where its relative error is largest."""

    name: str
    token: int
    error: float  # absolute
    relative: float  # to the largest value at that token
    tolerance: float  # of ``relative``

    @property
    def share(self) -> float:
        """The relative error as a share of the tolerance: above 1 is wrong; infinity for NaN."""
        return self.relative / self.tolerance if np.isfinite(self.relative) else np.inf


def difference(name: str, found: mx.array | Array, exact: Array, float32: Array) -> Difference:
    """Compare a tensor (..., T, width) with the reference in float64 and in float32."""
    size = max_per_token(exact) + np.finfo(np.float32).tiny
    found = np.array(found).astype(np.float64)  # in NumPy: Metal has no float64
    error = max_per_token(found - exact) if found.shape == exact.shape else np.full_like(size, np.inf)
    worst = int(np.argmax(np.nan_to_num(error / size, nan=np.inf)))
    tolerance = FACTOR * (max_per_token(float32 - exact) / size).max() + FLOOR * ULP
    return Difference(name, worst, float(error[worst]), float(error[worst] / size[worst]), float(tolerance))


def max_per_token(x: Array) -> Array:
    """Return the largest absolute value at each token: (..., T, width) -> (T,)."""
    return np.abs(x).max(axis=tuple(axis for axis in range(x.ndim) if axis != x.ndim - 2))


@dataclass(frozen=True)
class Comparison:
    """The differences of all tensors for a prompt, and of the logits of an ordinary forward pass."""

    n_tokens: int
    tensors: list[Difference]
    logits: Difference


def compare(model: GPT, weights: HubWeights, ids: Array) -> Comparison:
    """Run a prompt, ids (T,), through the model and the reference, layer by layer."""
    tensors: list[Difference] = []

    def add(prefix: str, found: dict[str, mx.array], exact: dict[str, Array], float32: dict[str, Array]) -> None:
        tensors.extend(difference(prefix + name, found[name], exact[name], float32[name]) for name in found)

    settings = weights.settings
    x, x32 = reference.embed(weights, ids), reference.embed(weights, ids, np.float32)
    add("", {"wte + wpe": model.embed(ids[None])[0]}, {"wte + wpe": x}, {"wte + wpe": x32})
    for layer, block in enumerate(model.h):
        w, w32 = weights.block(layer), weights.block(layer, np.float32)
        start = x.astype(np.float32)
        exact = reference.block(x, w, settings, layer)
        found = block_tensors(block, mx.array(start))
        add(f"h.{layer}.", found, exact, reference.block(start, w32, settings, layer))
        x, x32 = exact["resid_post"], reference.block(x32, w32, settings, layer)["resid_post"]
    start = x.astype(np.float32)
    exact = reference.head(x, weights)
    add("", head_tensors(model, mx.array(start)), exact, reference.head(start, weights, np.float32))
    end_to_end = reference.head(x32, weights, np.float32)["logits"]
    logits = difference("logits", model(ids[None])[0], exact["logits"], end_to_end)
    return Comparison(len(ids), tensors, logits)


def block_tensors(block: Block, x: mx.array) -> dict[str, mx.array]:
    """Return the tensors of a block under the names of ``reference.block``, from the model's modules; x (T, C)."""
    attn, mlp, T = block.attn, block.mlp, len(x)
    x = x[None]
    ln_1 = block.ln_1(x)
    attn_out = attn(ln_1)
    qkv = mx.split(attn.c_attn(ln_1), 3, axis=-1)
    q, k, v = (split_heads(part, attn.n_head) for part in qkv)
    pattern = attention_pattern(attention_scores(q, k, attn.scale), causal_mask(T, T))
    resid_mid = x + attn_out
    ln_2 = block.ln_2(resid_mid)
    c_fc = mlp.c_fc(ln_2)
    tensors = {
        "ln_1": ln_1,
        "attn.q": qkv[0],
        "attn.k": qkv[1],
        "attn.v": qkv[2],
        "attn.pattern": pattern,
        "attn.attended": weighted_values(pattern, v),
        "attn.c_proj": attn_out,
        "resid_mid": resid_mid,
        "ln_2": ln_2,
        "mlp.c_fc": c_fc,
        "mlp.activation": mlp.activation(c_fc),
        "mlp.c_proj": mlp(ln_2),
        "resid_post": block(x),
    }
    return {name: tensor[0] for name, tensor in tensors.items()}


def head_tensors(model: GPT, x: mx.array) -> dict[str, mx.array]:
    """Return the final layer norm and the logits; x (T, C)."""
    ln_f = model.ln_f(x[None])
    return {"ln_f": ln_f[0], "logits": model.logits(ln_f)[0]}
