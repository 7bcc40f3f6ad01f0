"""A model against the reference, tensor by tensor through the layers: so that a wrong one is told where it is wrong.

Each block is given the reference's own residual stream, so an error shows in the block that makes it and is not
carried on. What is compared comes from the model's own modules; ``resid_post`` is the block called as a whole.

How much may float32 be off? That depends on the weights and the tokens, so it is measured on them: the reference
computes everything a second time in float32, and its error is the ruler. Errors are taken at each token, relative to
the largest value there (in GPT-2 the first token's stream is in the thousands, the others' below a hundred). A tensor
may be off by FACTOR times the ruler's worst, and FLOOR roundings of 2^-24, for tensors so small that NumPy happens to
hit the truth.

Measured on random models, N(0, 0.02) and N(0, 0.1), 16 to 1024 wide, 2 to 24 layers, 1 to 128 tokens: of what is
tolerated our tensors use at most 0.20 with OpenBLAS and 0.32 with the reference BLAS of MLX's Linux wheel, which sums
term by term; the logits of the whole model 0.10 and 0.17. No GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.check import reference
from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.reference import Array
from mlx_gpt.model.attention import attention_pattern, attention_scores, causal_mask, split_heads, weighted_values
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT

FACTOR, FLOOR = 16, 16
ULP = 2.0**-24


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the truth, at the token where it is farthest."""

    name: str
    token: int
    error: float  # the largest, in the tensor's own units
    relative: float  # the same, as a share of the largest value at that token
    tolerance: float  # what ``relative`` may be

    @property
    def share(self) -> float:
        """The error as a share of what is tolerated: wrong above 1, or where there is no number at all."""
        return self.relative / self.tolerance if np.isfinite(self.relative) else np.inf


def difference(name: str, found: mx.array | Array, exact: Array, twin: Array) -> Difference:
    """Compare a tensor (..., T, width) with the truth, token by token. ``twin`` is NumPy's float32."""
    size = by_token(exact) + np.finfo(np.float32).tiny
    found = np.array(found).astype(np.float64)  # by NumPy: Metal has no float64
    error = by_token(found - exact) if found.shape == exact.shape else np.full_like(size, np.inf)
    worst = int(np.argmax(np.nan_to_num(error / size, nan=np.inf)))
    tolerance = FACTOR * (by_token(twin - exact) / size).max() + FLOOR * ULP
    return Difference(name, worst, float(error[worst]), float(error[worst] / size[worst]), float(tolerance))


def by_token(x: Array) -> Array:
    """The largest value at each token: (..., T, width) -> (T,)."""
    return np.abs(x).max(axis=tuple(axis for axis in range(x.ndim) if axis != x.ndim - 2))


@dataclass(frozen=True)
class Comparison:
    """What a prompt has shown: every tensor, then the logits as the model gives them when it is simply called."""

    n_tokens: int
    tensors: list[Difference]
    logits: Difference

    @property
    def first_wrong(self) -> Difference | None:
        return next((tensor for tensor in self.tensors if tensor.share > 1), None)


def compare(model: GPT, source: HubFolder, ids: Array) -> Comparison:
    """Run a prompt, ids (T,), through the model and through the reference, side by side."""
    tensors: list[Difference] = []

    def look(prefix: str, found: dict[str, mx.array], exact: dict[str, Array], twin: dict[str, Array]) -> None:
        tensors.extend(difference(prefix + name, found[name], exact[name], twin[name]) for name in found)

    x, twin = reference.embed(source, ids), reference.embed(source, ids, np.float32)
    look("", {"wte + wpe": model.embed(ids[None])[0]}, {"wte + wpe": x}, {"wte + wpe": twin})
    for layer, block in enumerate(model.h):
        w, w32, settings = source.block(layer), source.block(layer, np.float32), source.settings
        start = x.astype(np.float32)
        exact = reference.block(x, w, settings, layer)
        look(f"h.{layer}.", of_block(block, mx.array(start)), exact, reference.block(start, w32, settings, layer))
        x, twin = exact["resid_post"], reference.block(twin, w32, settings, layer)["resid_post"]
    start = x.astype(np.float32)
    exact = reference.head(x, source)
    look("", of_head(model, mx.array(start)), exact, reference.head(start, source, np.float32))
    end_to_end = reference.head(twin, source, np.float32)["logits"]
    whole = difference("logits", model(ids[None])[0], exact["logits"], end_to_end)
    return Comparison(len(ids), tensors, whole)


def of_block(block: Block, x: mx.array) -> dict[str, mx.array]:
    """The tensors of a block, as ``reference.block`` names them, from the model's own modules; x (T, C)."""
    attn, mlp, T = block.attn, block.mlp, len(x)
    x = x[None]
    ln_1 = block.ln_1(x)
    heard = attn(ln_1)
    qkv = mx.split(attn.c_attn(ln_1), 3, axis=-1)
    q, k, v = (split_heads(part, attn.n_head) for part in qkv)
    pattern = attention_pattern(attention_scores(q, k, attn.scale), causal_mask(T, T))
    resid_mid = x + heard
    ln_2 = block.ln_2(resid_mid)
    c_fc = mlp.c_fc(ln_2)
    tensors = {
        "ln_1": ln_1,
        "attn.q": qkv[0],
        "attn.k": qkv[1],
        "attn.v": qkv[2],
        "attn.pattern": pattern,
        "attn.attended": weighted_values(pattern, v),
        "attn.c_proj": heard,
        "resid_mid": resid_mid,
        "ln_2": ln_2,
        "mlp.c_fc": c_fc,
        "mlp.activation": mlp.activation(c_fc),
        "mlp.c_proj": mlp(ln_2),
        "resid_post": block(x),
    }
    return {name: tensor[0] for name, tensor in tensors.items()}


def of_head(model: GPT, x: mx.array) -> dict[str, mx.array]:
    """The last norm and the head; x (T, C)."""
    ln_f = model.ln_f(x[None])
    return {"ln_f": ln_f[0], "logits": model.logits(ln_f)[0]}
