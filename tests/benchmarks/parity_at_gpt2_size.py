"""Measure our float32 error and transformers', against float64, at the shapes of GPT-2's four sizes.

Run with the parity extra: ``python tests/benchmarks/parity_at_gpt2_size.py [gpt2 gpt2-medium gpt2-large gpt2-xl]``;
gpt2 by default. The weights are random, so that it runs offline: N(0, 0.02), as GPT-2 is initialised, and N(0, 0.1),
about as wide as trained. The reference is the float64 forward pass of ``mlx_gpt/check/reference.py``; xl takes 17 GB.

Products are compared on their own as well. On Linux, MLX's BLAS sums a product term by term, which over 3072 terms has
four times the rounding error of a sum in blocks, as in NumPy's OpenBLAS, to which ``mlx_gpt`` links it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx_gpt  # noqa: F401  # isort: skip  # before MLX, which then multiplies as for a user
import mlx.core as mx
import numpy as np
import torch
from transformers import GPT2LMHeadModel

from mlx_gpt.check.hub_folder import HubFolder
from mlx_gpt.check.reference import gpt2
from mlx_gpt.config import GPTConfig
from mlx_gpt.store.convert import hub_shapes
from mlx_gpt.store.folder import read_model
from mlx_gpt.store.model_config import config_json

TOKENS = {"gpt2": (2, 32), "gpt2-medium": (2, 32), "gpt2-large": (1, 32), "gpt2-xl": (1, 16)}


def write_random_weights(folder: Path, config: GPTConfig, std: float, rng: np.random.Generator) -> None:
    """Write a folder in GPT-2's shape with random tensors: N(0, std), norm scales around 1."""
    weights = {}
    for name, shape in hub_shapes(config).items():
        mean = 1 if len(shape) == 1 and name.endswith("weight") else 0
        weights[name] = mx.array(rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(config_json(config, [50256], 50256, mx.float32))


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    return np.array(read_model(folder)(ids))


def their_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def product_ratio(rng: np.random.Generator, K: int) -> float:
    """Return the ratio of MLX's rounding error to torch's in a product over K terms (root mean square)."""
    x, w = (rng.normal(0, 1, (n, K)).astype(np.float32) for n in (64, 768))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    ours, theirs = np.array(mx.array(x) @ mx.array(w).T), (torch.from_numpy(x) @ torch.from_numpy(w).T).numpy()
    return float(np.sqrt(((ours - exact) ** 2).mean() / ((theirs - exact) ** 2).mean()))


def measure(name: str, std: float) -> dict[str, Any]:
    """Return the largest errors of the logits of a few tokens."""
    config, rng = GPTConfig.preset(name), np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, TOKENS[name])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_weights(folder, config, std, rng)
        exact = np.stack([gpt2(HubFolder(folder), row) for row in ids])
        ours, theirs = (float(np.abs(f(folder, ids) - exact).max()) for f in (our_logits, their_logits))
    return {
        "size": name,
        "std": std,
        "tokens": list(ids.shape),
        "largest_logit": float(np.abs(exact).max()),
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "product_ratio": product_ratio(rng, config.inner_dim),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=", ".join(TOKENS))
    flags = parser.parse_args()
    for name in flags.sizes or ["gpt2"]:
        for std in (0.02, 0.1):
            print(json.dumps(measure(name, std)), flush=True)
