"""How far are we, and how far is transformers, from the truth? At GPT-2 124M's shape, in float32, against float64.

Run with the parity extra: ``python tests/parity_at_gpt2_size.py``. No real weights can be had offline, so these are
random: N(0, 0.02) as GPT-2 starts, and N(0, 0.1), about as wide as it ends.

On Linux the MLX wheel brings the reference BLAS, which sums a product term by term: over 3072 terms that is four
times the rounding of a BLAS that sums in blocks. So the script also says how the products alone compare.
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from reference_numpy import gpt2
from transformers import GPT2Config, GPT2Model

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.convert import from_hub, hub_shapes

CONFIG = GPTConfig()  # 124M


def random_weights(std: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Hub tensors in GPT-2's shape, every one random: N(0, std), the scales of norms around 1."""
    weights = {}
    for name, shape in hub_shapes(CONFIG).items():
        mean = 1 if len(shape) == 1 and name.endswith("weight") else 0
        weights[name] = rng.normal(mean, std, shape).astype(np.float32)
    return weights


def our_logits(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    model = GPT(CONFIG).eval()
    model.load_weights(list(from_hub({name: mx.array(weight) for name, weight in weights.items()}, CONFIG).items()))
    return np.array(model(ids))


def their_logits(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    model = GPT2Model(GPT2Config(attn_implementation="eager")).eval()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    with torch.no_grad():
        return (model(torch.from_numpy(ids)).last_hidden_state @ model.wte.weight.T).numpy()


def product_ratio(rng: np.random.Generator) -> float:
    """Rounding of a product over 3072 terms in MLX, as a multiple of that in torch (root mean square)."""
    x, w = (rng.normal(0, 1, shape).astype(np.float32) for shape in [(64, 3072), (3072, 768)])
    exact = x.astype(np.float64) @ w.astype(np.float64)
    ours, theirs = np.array(mx.array(x) @ mx.array(w)), (torch.from_numpy(x) @ torch.from_numpy(w)).numpy()
    return float(np.sqrt(((ours - exact) ** 2).mean() / ((theirs - exact) ** 2).mean()))


def measure(std: float) -> dict[str, Any]:
    """The largest errors of the logits of 2 x 32 tokens."""
    rng = np.random.default_rng(0)
    weights, ids = random_weights(std, rng), rng.integers(0, CONFIG.vocab_size, (2, 32))
    exact, _ = gpt2(weights, {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head}, ids)
    ours, theirs = (float(np.abs(f(weights, ids) - exact).max()) for f in (our_logits, their_logits))
    return {
        "std": std,
        "largest_logit": float(np.abs(exact).max()),
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "product_ratio": product_ratio(rng),
    }


if __name__ == "__main__":
    for std in (0.02, 0.1):
        print(json.dumps(measure(std)))
